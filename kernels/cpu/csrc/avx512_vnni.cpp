// AVX-512 with VNNI: see vnni512.h.
#define QNN_LANES 16
#include "tiers.h"
#include "vnni512.h"

namespace qnn {

extern const Tier avx512_vnni = {"avx512_vnni", vnni512_runs_here, kernel<Vnni>(),
                                 kernel<Avx512Float>(), quantize};

}  // namespace qnn

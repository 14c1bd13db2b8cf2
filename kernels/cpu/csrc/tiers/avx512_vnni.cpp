// AVX-512 with VNNI: see vnni512.h.
#define QNN_LANES 16
#include "recurrent/recurrent.h"
#include "tiers/tiers.h"
#include "tiers/vnni512.h"

namespace qnn {

extern const Tier avx512_vnni = {"avx512_vnni",
                                 vnni512_runs_here,
                                 kernel<Vnni>(),
                                 kernel<Avx512Float>(),
                                 quantize,
                                 recurrent<IntegerProduct<Vnni, 6, 8>>(),
                                 recurrent<FloatProduct<Avx512Machine, 6, 8>>()};

}  // namespace qnn

// AVX-512 with VNNI: see vnni512.h.
#define QNN_LANES 16
#include "attention/cache_loops.h"
#include "attention/loops.h"
#include "conv/loops.h"
#include "embedding/embedding.h"
#include "linear/loops.h"
#include "norm/rows.h"
#include "recurrent/recurrent.h"
#include "tiers/tiers.h"
#include "tiers/vnni512.h"

namespace qnn {

constexpr Tier avx512_vnni = [] {
  Tier t{};
  t.name = "avx512_vnni";
  t.runs_here = vnni512_runs_here;
  t.int8 = kernel<Vnni>();
  t.int16 = kernel<Int16Tier<VnniWords>>();
  t.int8_int4 = int8_int4<Avx512Machine>();
  t.weight_only = kernel<FloatTier<Avx512Machine>>();
  t.quantize = quantize;
  t.look_up = look_up<FloatTier<Avx512Machine>>;
  t.norm = norm_rows;
  t.recurrent = recurrent<IntegerProduct<Vnni, 6, 8>>();
  t.recurrent_int16 = recurrent<IntegerProduct<VnniWords, 6, 8, double>>();
  t.recurrent_weight = recurrent<FloatProduct<Avx512Machine, 6, 8>>();
  t.conv = conv<IntegerConv<Vnni>>();
  t.conv_int16 = conv<Int16Conv<VnniWords>>();
  t.conv_weight = conv<FloatConv<Avx512Machine>>();
  t.attention = attention<AttentionProduct<Vnni>>();
  t.cache = cached<Vnni>();
  return t;
}();

}  // namespace qnn

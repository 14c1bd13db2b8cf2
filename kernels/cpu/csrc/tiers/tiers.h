// The tiers, best first. Each stands in the file of its name, compiled for its own instruction set,
// and is a constant: code that fills one would run on every CPU.
#pragma once

#include "conv/conv.h"
#include "embedding/lookup.h"
#include "linear/linear.h"
#include "recurrent/recurrent_call.h"

namespace qnn {

struct Tier {
  const char* name;
  bool (*runs_here)();
  Kernel int8;         // rows quantised to int8, and w so too
  Kernel int16;        // rows quantised to int16
  Kernel int8_int4;    // rows quantised to int8, and w int4
  Kernel weight_only;  // rows as they are, float32 accumulation, w in any format
  void (*quantize)(const Quantize&, int part, int parts);
  void (*look_up)(const Lookup&, int part, int parts);
  RecurrentKernel recurrent;         // of int8 and int8_static
  RecurrentKernel recurrent_int16;   // of int16 and int16_static
  RecurrentKernel recurrent_weight;  // of int8_weight
  ConvKernel conv;                   // of int8, int8_static and codes
  ConvKernel conv_weight;            // of int8_weight
};

namespace {

// What a tier has for a recurrent layer.
inline const RecurrentKernel& kernel_of(const Tier& tier, const Recurrent& p) {
  return p.scheme == Scheme::weight ? tier.recurrent_weight
         : p.wide                   ? tier.recurrent_int16
                                    : tier.recurrent;
}

}  // namespace

extern const Tier amx, avx512_vnni, avx_vnni, avx2, portable;

namespace {

// Those that a library is linked with; it is compiled with a define for each that it is without.
constexpr const Tier* kTiers[] = {
#if defined(__x86_64__)
#ifndef QNN_NO_AMX
    &amx,
#endif
#ifndef QNN_NO_AVX512_VNNI
    &avx512_vnni,
#endif
#ifndef QNN_NO_AVX_VNNI
    &avx_vnni,
#endif
#ifndef QNN_NO_AVX2
    &avx2,
#endif
#endif
    &portable,
};

}  // namespace
}  // namespace qnn

// The tiers, best first. Each stands in the file of its name, compiled for its own instruction set,
// and is a constant: code that fills one would run on every CPU. What a tier would compile as
// another does it leaves null, and names that one.
#pragma once

#include "attention/attention.h"
#include "attention/cache.h"
#include "conv/conv.h"
#include "embedding/lookup.h"
#include "linear/linear.h"
#include "norm/norm.h"
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
  NormKernel norm;
  RecurrentKernel recurrent;         // of int8 and int8_static
  RecurrentKernel recurrent_int16;   // of int16 and int16_static
  RecurrentKernel recurrent_weight;  // of int8_weight
  ConvKernel conv;                   // of int8, int8_static and codes
  ConvKernel conv_int16;             // of int16 and int16_static
  ConvKernel conv_weight;            // of int8_weight
  AttentionKernel attention;         // of int8
  CacheKernel cache;                 // of int8
  const Tier* base;                  // whose are the fields that are null here; or null
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

// Those that a library is linked with, none without its base; it is compiled with a define for each
// that it is without.
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

// With what it has of its base. (Not a tier's code: its file is for every CPU.)
inline Tier whole(const Tier& tier) {
  Tier all = tier;
  for (const Tier* base = tier.base; base != nullptr; base = base->base) {
    if (all.int8.run == nullptr) all.int8 = base->int8;
    if (all.int16.run == nullptr) all.int16 = base->int16;
    if (all.int8_int4.run == nullptr) all.int8_int4 = base->int8_int4;
    if (all.weight_only.run == nullptr) all.weight_only = base->weight_only;
    if (all.quantize == nullptr) all.quantize = base->quantize;
    if (all.look_up == nullptr) all.look_up = base->look_up;
    if (all.norm == nullptr) all.norm = base->norm;
    if (all.recurrent.run == nullptr) all.recurrent = base->recurrent;
    if (all.recurrent_int16.run == nullptr) all.recurrent_int16 = base->recurrent_int16;
    if (all.recurrent_weight.run == nullptr) all.recurrent_weight = base->recurrent_weight;
    if (all.conv.run == nullptr) all.conv = base->conv;
    if (all.conv_int16.run == nullptr) all.conv_int16 = base->conv_int16;
    if (all.conv_weight.run == nullptr) all.conv_weight = base->conv_weight;
    if (all.attention.rows == nullptr) all.attention = base->attention;
    if (all.cache.rows == nullptr) all.cache = base->cache;
  }
  return all;
}

}  // namespace
}  // namespace qnn

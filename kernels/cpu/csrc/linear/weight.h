// How the weight of a linear layer is stored, and the ops over a weight in each format.
#pragma once

#include <string>

#include "common/types.h"

namespace qnn {

// What reads the codes: the file of its name in linear/decoders.
enum class Decoder { int8, e4m3, e2m1, int4 };
enum class ScaleKind { float32, e4m3 };

struct WeightFormat {
  const char* name;
  Decoder decoder;
  int bits;       // of a code; of 4, the first of a byte is in the low nibble
  int64_t group;  // codes of a row that share a scale; 0: the whole row does
  ScaleKind scale;
  bool divisor;      // one float32 that divides all scales
  bool zero_points;  // each group says which code is 0

  bool grouped() const { return group != 0; }
  int64_t groups(int64_t k) const { return grouped() ? (k + group - 1) / group : 1; }
  // Groups are whole in memory.
  int64_t row_bytes(int64_t k) const { return (grouped() ? groups(k) * group : k) * bits / 8; }
};

namespace {

constexpr WeightFormat kInt8{"int8", Decoder::int8, 8, 0, ScaleKind::float32, false, false};
constexpr WeightFormat kE4m3{"e4m3", Decoder::e4m3, 8, 0, ScaleKind::float32, false, false};
constexpr WeightFormat kE2m1{"e2m1", Decoder::e2m1, 4, 16, ScaleKind::e4m3, true, false};
constexpr WeightFormat int4_in_groups(int64_t group, bool zero_points) {
  return {"int4", Decoder::int4, 4, group, ScaleKind::float32, false, zero_points};
}

struct WeightOp {
  const char* name;
  WeightFormat weight;
  bool quantizes = false;  // rows of x to int8; else they stay as they are
};
// Layers over a weight that is not int8. Their arguments are x, the
// codes, the scales, the divisor or the zero points where there are, and the bias.
constexpr WeightOp kWeightOps[] = {
    {"fp8_weight_linear", kE4m3},
    {"nvfp4_weight_linear", kE2m1},
    {"int4_weight_linear", int4_in_groups(128, false)},
    {"int4_g64_weight_linear", int4_in_groups(64, false)},
    {"int4_g32_weight_linear", int4_in_groups(32, false)},
    {"int4_asym_weight_linear", int4_in_groups(128, true)},
    {"int4_asym_g64_weight_linear", int4_in_groups(64, true)},
    {"int4_asym_g32_weight_linear", int4_in_groups(32, true)},
    {"int8_int4_linear", int4_in_groups(128, false), true},
    {"int8_int4_g64_linear", int4_in_groups(64, false), true},
    {"int8_int4_g32_linear", int4_in_groups(32, false), true},
    {"int8_int4_asym_linear", int4_in_groups(128, true), true},
    {"int8_int4_asym_g64_linear", int4_in_groups(64, true), true},
    {"int8_int4_asym_g32_linear", int4_in_groups(32, true), true},
};

// "int4, a float32 scale per group of 32, zero points"
inline std::string text(const WeightFormat& f) {
  return std::string(f.name) + ", a " + (f.scale == ScaleKind::float32 ? "float32" : "e4m3") +
         " scale per " + (f.grouped() ? "group of " + std::to_string(f.group) : "channel") +
         (f.divisor ? ", one divisor" : "") + (f.zero_points ? ", zero points" : "");
}

// Why no decoder reads such a format, or null.
inline const char* why_not(const WeightFormat& f) {
  if (f.bits != 8 && f.bits != 4) return "codes of another width than 8 or 4 bits";
  if (f.group < 0 || (f.group & (f.group - 1)) != 0 || f.group % (32 / f.bits) != 0)
    return "groups that are not a power of two, or not whole words";
  if (!f.grouped() && (f.zero_points || f.divisor || f.scale != ScaleKind::float32))
    return "a scale per channel that is not a float32 alone";
  return nullptr;
}

}  // namespace
}  // namespace qnn

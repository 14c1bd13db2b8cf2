// How the weight of a linear layer is stored.
#pragma once

#include "common/types.h"

namespace qnn {

// What reads the codes: the file of its name in linear/decoders.
enum class Decoder { int8, e4m3, e2m1, int4 };
enum class ScaleKind { float32, e4m3 };

struct WeightFormat {
  Decoder decoder;
  int bits;       // of a code; of 4, the first of a byte is in the low nibble
  int64_t group;  // codes of a row that share a scale; 0: the whole row does
  ScaleKind scale;
  bool zero_points;  // each group says which code is 0

  bool grouped() const { return group != 0; }
  int64_t groups(int64_t k) const { return grouped() ? (k + group - 1) / group : 1; }
  // Groups are whole in memory.
  int64_t row_bytes(int64_t k) const { return (grouped() ? groups(k) * group : k) * bits / 8; }
};

namespace {

constexpr WeightFormat kInt8{Decoder::int8, 8, 0, ScaleKind::float32, false};
constexpr WeightFormat kE4m3{Decoder::e4m3, 8, 0, ScaleKind::float32, false};
constexpr WeightFormat kE2m1{Decoder::e2m1, 4, 16, ScaleKind::e4m3, false};
constexpr WeightFormat int4_in_groups(int64_t group, bool zero_points) {
  return {Decoder::int4, 4, group, ScaleKind::float32, zero_points};
}

}  // namespace
}  // namespace qnn

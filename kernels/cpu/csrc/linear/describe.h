// What is wrong with a call of the kernels, and how its weight reads in a message.
#pragma once

#include <string>

#include "linear/linear.h"

namespace qnn {
namespace {

// "int4, a float32 scale per group of 32, zero points"
inline std::string text(const WeightFormat& f) {
  constexpr const char* kDecoders[] = {"int8", "e4m3", "e2m1", "int4"};
  constexpr const char* kScales[] = {"float32", "e4m3"};
  return std::string(kDecoders[static_cast<int>(f.decoder)]) + ", a " +
         kScales[static_cast<int>(f.scale)] + " scale per " +
         (f.grouped() ? "group of " + std::to_string(f.group) : "channel") +
         (f.zero_points ? ", zero points" : "");
}

// Why no decoder reads such a format, or null.
inline const char* why_not(const WeightFormat& f) {
  const bool bytes = f.decoder == Decoder::int8 || f.decoder == Decoder::e4m3;
  if (f.bits != (bytes ? 8 : 4)) return "codes of another width than their decoder's";
  if (bytes && f.grouped()) return "groups, which codes of 8 bits do not have";
  if (f.zero_points && f.decoder != Decoder::int4) return "zero points, which int4 alone has";
  switch (f.decoder) {
    case Decoder::int8:
    case Decoder::e4m3:
      return f.scale == ScaleKind::float32 ? nullptr : "scales of another kind than float32";
    case Decoder::e2m1:
      return f.group != 16                ? "a group of another size than 16"
             : f.scale != ScaleKind::e4m3 ? "scales of another kind than e4m3"
                                          : nullptr;
    case Decoder::int4:
      return f.group < 32 || (f.group & (f.group - 1)) != 0
                 ? "a group whose size is not a power of two from 32 on"
             : f.scale != ScaleKind::float32 ? "scales of another kind than float32"
                                             : nullptr;
  }
  return "an unknown decoder";
}

// Why the kernels cannot take a call, or null.
inline const char* why_not(const Linear& p) {
  if (const char* why = why_not(p.weight)) return why;
  if (p.m <= 0 || p.n <= 0 || p.k < 0) return "an empty result";
  if (p.y == nullptr || p.sw == nullptr) return "a missing operand";
  if (p.k > 0 && (p.x == nullptr || p.w == nullptr)) return "a missing operand";
  if (p.weight.grouped() ? p.k > 0 && p.group_scale == nullptr : p.group_scale != nullptr)
    return "scales of groups, or none, against the format";
  if (p.weight.zero_points ? p.k > 0 && p.zero_points == nullptr : p.zero_points != nullptr)
    return "zero points, or none, against the format";
  if (p.weight.decoder == Decoder::int4 && p.k % p.weight.group != 0)
    return "rows that are not whole groups";
  return nullptr;
}

}  // namespace
}  // namespace qnn

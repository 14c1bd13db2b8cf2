// The tiers in bfloat16: a weight whose codes bfloat16 holds exactly, times rows of x in parts of
// bfloat16, with sums in float32. So products are exact.
#pragma once

#include "linear/decoders.h"
#include "linear/inner.h"

namespace qnn {
namespace {

// What such a tier has beside its machine's part M: the products, for many rows alone.
//
// A panel: the lines of 16 rows alternate, so that 16 rows by 32 codes are one piece of 1 kB, which
// the first-level cache gives faster than rows that lie apart. A scale of a group in float32 would
// be rounded with its codes, so these are there without it, and after them a line for each row has
// its scales: the machine multiplies the sum of each group.
template <class M>
struct Bfloat16Tier : M {
  using Code = uint16_t;
  using Panel = uint16_t;
  using Acc = float;
  using Sum = vfloat;
  using Row = WeightRow;
  static constexpr bool kQuantizes = false;
  static constexpr int64_t kGroup = 2, kOffset = 0;
  static constexpr int64_t kPanelLine = kLine / sizeof(Panel), kPanelBlock = 16;
  // The least group with a scale, so that a line holds those of a row of a panel.
  static constexpr int64_t kLeastGroup = 32;
  static_assert(M::kDepth / kLeastGroup * sizeof(float) <= kLine);

  static bool takes(const WeightFormat& w) {
    return !w.grouped() || w.scale != ScaleKind::float32 || w.group >= kLeastGroup;
  }

  static Row row(const Linear& p, int64_t n) { return weight_row(p, n); }

  // The first line of row c.
  template <class To>
  static To* panel_row(To* panels, int64_t c) {
    return panels + c / kPanelBlock * kPanelBlock * kPanelStride<Bfloat16Tier> +
           c % kPanelBlock * kPanelLine;
  }
  static const float* panel_scales(const Panel* row) {
    return reinterpret_cast<const float*>(row + kPanelBlock * M::kDepth);
  }

  static void fill_panel(Panel* to, const Row& w, int64_t k, int64_t depth) {
    AllDecoders::with(
        w.decoder, [&](auto decoder) { decltype(decoder)::panel(Alternating{to}, w, k, depth); });
    if (w.decoder != Decoder::int4 || depth == 0) return;
    const auto* scales = static_cast<const float*>(w.scales) + (k >> w.shift);
    std::memcpy(to + kPanelBlock * M::kDepth, scales,
                div_up(depth, int64_t{1} << w.shift) * sizeof(float));
  }
  static void clear_panel(Panel* to, int64_t words) {
    for (int64_t i = 0; i < words * kGroup; i += kPanelLine)
      std::memset(to + kPanelBlock * i, 0, kLine);
  }
};

}  // namespace
}  // namespace qnn

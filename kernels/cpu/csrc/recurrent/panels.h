// A weight in the panels that a product takes, [block of units][word][gate][lane].
#pragma once

#include "recurrent/cell.h"
#include "recurrent/products.h"

namespace qnn {
namespace {

// A weight, which is laid into panels.
template <class P, int G>
struct Panels {
  static constexpr int64_t kWidth = G * kLanes;  // columns in a block

  // A block, and after it its panel.
  struct Block {
    int32_t start[kWidth];  // what sums start at: low times the sum of a column's codes
    float sw[kWidth], bias[kWidth];
    const char* panel() const { return reinterpret_cast<const char*>(this + 1); }
  };

  const int8_t* w;
  const float* sw;
  const void* bias;
  DType bias_dtype;
  // Row `g · gate + block · step + lane` of w, up to row `g · gate + rows`, is lane `lane` of gate
  // g.
  int64_t depth, rows, gate, step, blocks;
  int32_t low;
  Grid grids[G];

  // Of G gates, a block of units each; or, without gates, G times as many columns.
  static Panels of_gates(const int8_t* w, const float* sw, const void* bias, DType bias_dtype,
                         int64_t units, int64_t depth) {
    return {w, sw, bias, bias_dtype, depth, units, units, kLanes, div_up(units, kLanes), 0, {}};
  }
  static Panels plain(const int8_t* w, const float* sw, int64_t columns, int64_t depth) {
    return {w, sw, nullptr, DType::float32, depth, columns, kLanes, kWidth, div_up(columns, kWidth),
            0, {}};
  }

  int64_t words() const { return round_up(div_up(depth, P::kGroup), P::kWordStep); }
  int64_t block_bytes() const {
    return static_cast<int64_t>(sizeof(Block)) + round_up(words(), kLanes) * kWidth * 4;
  }
  int64_t code_stride() const {
    const int64_t most = round_up(depth, kLanes), padded = words() * P::kGroup;
    constexpr int64_t size = sizeof(typename P::Code);
    // One more line: rows a multiple of 4,096 bytes apart would share the sets of the cache.
    return (round_up((most < padded ? padded : most) * size, kLine) + kLine) / size;
  }

  QNN_KERNEL void pack(int64_t index, Block* to) const {
    char* panel = reinterpret_cast<char*>(to + 1);
    for (int g = 0; g < G; ++g) {
      // Columns without gates end where all end.
      const int64_t first = g * gate + index * step;
      const int64_t left = gate == kLanes && step == kWidth ? rows - first : rows - index * step;
      const int64_t count = left < 0 ? 0 : left < kLanes ? left : kLanes, at = g * kLanes;
      write(to->sw + at, count > 0 ? load_some<Float32>(sw + first, count) : vfloat{});
      vfloat b = {};
      if (bias != nullptr && count > 0) b = load_floats(bias_dtype, bias, first, count);
      write(to->bias + at, b);
      vint sum = {};
      // The rows of the next gate, or of the next block, are fetched from memory meanwhile: alone
      // a CPU does not see so many short streams coming.
      const int64_t after = g + 1 < G ? first + gate : (index + 1) * step;
      const bool more = after + kLanes <= (gate == rows ? G : 1) * rows;
      const int8_t* next = w + after * depth;
      for (int64_t word = 0; word * P::kGroup < round_up(depth, P::kGroup * kLanes);
           word += kLanes) {
        const int64_t k = word * P::kGroup, some = depth - k;
        char* here = panel + (word * G + g) * kLanes * 4;
        const bool whole = P::kGroup == 4 && count == kLanes && some >= P::kGroup * kLanes;
        if (more) {
          const int8_t* line = next + k * kLanes;
          for (int i = 0; i < P::kGroup * kLanes * kLanes && line + i < next + depth * kLanes;
               i += kLine)
            __builtin_prefetch(line + i);
        }
        if (whole) {
          P::transpose(w + first * depth + k, depth, here, kWidth * 4);
        } else {
          alignas(64) char square[kLanes * kLanes * 4] = {};
          for (int64_t lane = 0; lane < count; ++lane)
            P::widen(w + (first + lane) * depth + k, some, square + lane * kLanes * 4);
          P::transpose(square, kLanes * 4, here, kWidth * 4);
        }
        if constexpr (P::kShifts) {
          for (int i = 0; i < kLanes; ++i)
            sum = P::sum_of_codes(sum, read<vint>(here + i * kWidth * 4));
        }
      }
      write(to->start + at, (vint)((vuint)sum * static_cast<uint32_t>(low)));
    }
  }
};

// Sums to values of a linear, each rounded to the grid of its gate's part.
template <class P, int G>
QNN_KERNEL void scale_sums(const typename P::Acc* acc, int64_t rows,
                           const typename Panels<P, G>::Block& block, bool biased,
                           const Grid* grids, const float* scales, float* to) {
  for (int g = 0; g < G; ++g) {
    const vfloat sw = read<vfloat>(block.sw + g * kLanes),
                 bias = read<vfloat>(block.bias + g * kLanes);
    const Grid grid = grids[g];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (r * G + g) * kLanes;
      vfloat v = sum_as_float(read<Sums<P>>(acc + at)) * sw;
      if constexpr (P::kQuantizes) v = v * scales[r];
      if (biased) v = v + bias;
      write(to + at, round_to(grid, v));
    }
  }
}

}  // namespace
}  // namespace qnn

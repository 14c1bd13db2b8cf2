// The dot form, of few rows: see loops.h.
#pragma once

#include "linear/inner.h"
#include "linear/output.h"
#include "linear/rows.h"

namespace qnn {
namespace {

template <class T>
struct Dots {
  using Code = typename T::Code;
  static constexpr int64_t kCodeStep = kLine / static_cast<int64_t>(sizeof(Code));

  // Those of x. Where the zero point is not 0, one more, all ones: its products with w are the sums
  // of the rows of w, Σ w, without reading w twice; memory is what takes the time.
  static int64_t rows_of(const Linear& p) { return p.m + (T::kQuantizes && p.zero_point != 0); }

  // Codes of a row with the zeros after it.
  static int64_t padded(const Linear& p) {
    if constexpr (T::kQuantizes) {
      return round_up(p.k, kLine);
    } else {
      return round_up(p.k, T::kRowStep);
    }
  }

  struct Buffers {
    int64_t stride;  // codes from a row to the next
    Code* codes;
    float* scale;
    int32_t* start;
    typename T::Acc* acc;  // [row][column of the chunk]
    Columns<T> columns;
    Buffers(Scratch scratch, const Linear& p, size_t* used)
        : stride(padded(p) + kCodeStep),
          codes(scratch.take<Code>(rows_of(p) * stride)),
          scale(scratch.take<float>(rows_of(p))),
          start(scratch.take<int32_t>(rows_of(p))),
          acc(scratch.take<typename T::Acc>(rows_of(p) * T::kChunk)),
          columns(Columns<T>::take(scratch)) {
      if (used != nullptr) *used = scratch.used();
    }
  };

  static size_t scratch_bytes(const Linear& p) {
    size_t used = 0;
    Buffers(Scratch(nullptr), p, &used);
    return used;
  }

  static void run(const Linear& p, int part, int parts, char* scratch) {
    Buffers b(Scratch(scratch), p, nullptr);
    // Whole cache lines of y to each part.
    const int64_t pieces = div_up(p.n, kLanes);
    const int64_t begin = pieces * part / parts * kLanes,
                  all = pieces * (part + 1) / parts * kLanes;
    const int64_t end = all < p.n ? all : p.n;
    if (begin >= end) return;
    for (int64_t row = 0; row < p.m; ++row) {
      b.start[row] =
          -T::kOffset * read_row<T>(p, row, padded(p), b.codes + row * b.stride, b.scale + row);
      if constexpr (!T::kQuantizes)
        T::arrange(p.weight.decoder, b.codes + row * b.stride, padded(p));
    }
    if (rows_of(p) > p.m) {
      Code* ones = b.codes + p.m * b.stride;
      for (int64_t i = 0; i < padded(p); ++i) ones[i] = i < p.k;
      b.start[p.m] = static_cast<int32_t>(-T::kOffset * p.k);
    }
    for (int64_t n = begin; n < end; n += T::kChunk) {
      b.columns.move_to(p, n, end - n < T::kChunk ? end - n : T::kChunk);
      multiply(p, b);
      scale_rows(p, b);
      put_rows(p, 0, p.m, b.columns.begin, b.columns.count, reinterpret_cast<float*>(b.acc),
               T::kChunk * static_cast<int64_t>(sizeof(typename T::Acc) / sizeof(float)));
    }
  }

  static auto row_of(const Linear& p, int64_t n) {
    if constexpr (T::kQuantizes) {
      return p.w + n * p.k;
    } else {
      return T::row(p, n);
    }
  }

  static void multiply(const Linear& p, Buffers& b) {
    for (int64_t c = 0; c < b.columns.count; c += T::kDotColumns) {
      // After the last row of w its last row again: the same memory, and sums that nobody reads.
      decltype(row_of(p, 0)) w[T::kDotColumns];
      for (int64_t i = 0; i < T::kDotColumns; ++i) {
        const int64_t column = c + i < b.columns.count ? c + i : b.columns.count - 1;
        w[i] = row_of(p, b.columns.begin + column);
      }
      int64_t row = 0;
      const auto rest = [&](auto rows) {
        for (; row + rows() <= rows_of(p); row += rows()) {
          T::template dot<rows()>(b.codes + row * b.stride, b.stride, w, p.k,
                                  b.acc + row * T::kChunk + c);
        }
      };
      rest(std::integral_constant<int, 4>{});
      rest(std::integral_constant<int, 2>{});
      rest(std::integral_constant<int, 1>{});
    }
  }

  // Sums to floats, in their place.
  static void scale_rows(const Linear& p, const Buffers& b) {
    for (int64_t row = 0; row < p.m; ++row) {
      typename T::Acc* acc = b.acc + row * T::kChunk;
      auto* values = reinterpret_cast<float*>(acc);
      for (int64_t c = 0; c < b.columns.count; c += kLanes) {
        auto sums = read<typename T::Sum>(acc + c);
        // Of long rows the two terms may wrap, their sum does not.
        if constexpr (T::kOffset != 0)
          sums = (vint)((vuint)sums + static_cast<uint32_t>(b.start[row]));
        if constexpr (kZeroPoints<T>) {
          if (p.zero_point != 0) {
            vuint columns = read<vuint>(b.acc + p.m * T::kChunk + c);
            if constexpr (T::kOffset != 0) columns += static_cast<uint32_t>(b.start[p.m]);
            sums = (vint)((vuint)sums - columns * static_cast<uint32_t>(p.zero_point));
          }
        }
        write(values + c, scaled_sums<T>(sums, read<vfloat>(b.columns.sw + c), splat(b.scale[row]),
                                         read<vfloat>(b.columns.bias + c)));
      }
    }
  }
};

}  // namespace
}  // namespace qnn

// int8_int4: rows of x quantised to int8, times int4 in groups. The sum of a group is an exact
// integer; times the group's scale it is added in float32, a group after the other.
//
// A lane is a column of y. The words of kLanes rows of w, eight codes each, are turned once for all
// rows of a tile, and the eight codes of a row of x that they meet are sent to all lanes; so no sum
// is reduced over lanes, which the sums of short groups would be all the time, and y is written as
// it lies.
#pragma once

#include "linear/decoders/int4.h"
#include "linear/output.h"
#include "linear/rows.h"

namespace qnn {
namespace {

// Onto the sums of 32 codes: `byte_products`, by `whole` to be made sums of a lane.
inline vint add_products(vint sum, vuint even, vint x_even, vuint odd, vint x_odd) {
#if defined(__AVX512VNNI__) && QNN_LANES == 16
  sum = (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)even, (__m512i)x_even);
  return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)odd, (__m512i)x_odd);
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__) && QNN_LANES == 8
  sum = (vint)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)even, (__m256i)x_even);
  return (vint)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)odd, (__m256i)x_odd);
#elif defined(__AVXVNNI__) && QNN_LANES == 8
  sum = (vint)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)even, (__m256i)x_even);
  return (vint)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)odd, (__m256i)x_odd);
#elif defined(__AVX2__) && QNN_LANES == 8
  // Sixteen products in 16 bits are at most 30,480.
  static_assert(16 * 15 * 127 < 32768);
  const __m256i more = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)even, (__m256i)x_even),
                                        _mm256_maddubs_epi16((__m256i)odd, (__m256i)x_odd));
  return (vint)_mm256_add_epi16((__m256i)sum, more);
#else
  return sum + byte_products<0>(even, x_even, odd, x_odd);
#endif
}

inline vint whole(vint sum) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__) && QNN_LANES == 8
  return (vint)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#else
  return sum;
#endif
}

constexpr int kUnrolled = kLanes == 4 ? 1 : 4;  // words; plain products are long as they are

// What a machine M, as of FloatTier, makes of it.
template <class M>
struct Int8Int4 : M {
  using Code = int8_t;
  using Acc = float;
  using Sum = vfloat;
  static constexpr bool kQuantizes = true;
  // Rows at once: two vectors of sums to each, and four more.
  static constexpr int kRows = kLanes == 16 ? 12 : 4;
  static constexpr int64_t kOffset = 0, kChunk = kLanes, kWord = 8, kTileRows = 96;

  // kLanes rows of w, turned: [word][lane], and [group][lane] of what groups have each.
  struct Panel {
    uint32_t* words;
    float* scale;
    int32_t* zero;
  };

  struct Buffers {
    int64_t rows, groups;  // of a tile; of a row of w
    Code* codes;           // [row][k], of eight the even ones first
    float* scale;          // [row]
    int32_t* sums;         // [row][group], of the codes
    float* acc;            // [row][lane]
    Panel panel;
    Columns<Int8Int4> columns;
    Buffers(Scratch scratch, const Linear& p, int parts, size_t* used)
        : rows(tile_rows(p, parts)),
          groups(p.weight.groups(p.k)),
          codes(scratch.take<Code>(rows * round_up(p.k, kLine))),
          scale(scratch.take<float>(rows)),
          sums(scratch.take<int32_t>(rows * groups)),
          acc(scratch.take<float>(rows * kLanes)),
          panel{scratch.take<uint32_t>(round_up(p.k / kWord, kLanes) * kLanes),
                scratch.take<float>(round_up(groups, kLanes) * kLanes),
                scratch.take<int32_t>(groups * kLanes)},
          columns(Columns<Int8Int4>::take(scratch)) {
      if (used != nullptr) *used = scratch.used();
    }
  };

  // An even share of the rows, and as few tiles as parts of the call where that is enough.
  static int64_t tile_rows(const Linear& p, int parts) {
    const int64_t most = larger(kRows, smaller(kTileRows, M::kTileBytes / larger(p.k, 1)));
    const int64_t share = round_up(div_up(p.m, parts), kRows);
    const int64_t even = div_up(p.m, larger(div_up(p.m, most), 1));
    return larger(smaller(even, larger(share, kRows)), 1);
  }

  static size_t scratch_bytes(const Linear& p) {
    size_t used = 0;
    Buffers(Scratch(nullptr), p, 1, &used);
    return used;
  }

  static void run(const Linear& p, int part, int parts, char* scratch) {
    Buffers b(Scratch(scratch), p, parts, nullptr);
    const int64_t blocks = div_up(p.n, kLanes), units = div_up(p.m, b.rows) * blocks;
    const int64_t end = units * (part + 1) / parts;
    int64_t filled = -1;
    for (int64_t unit = units * part / parts; unit < end; ++unit) {
      const int64_t tile = unit / blocks, first = tile * b.rows,
                    count = smaller(b.rows, p.m - first);
      if (tile != filled) fill(p, b, first, count);
      filled = tile;
      b.columns.move_to(p, unit % blocks * kLanes, kLanes);
      turn(p, b);
      const int64_t times = div_up(count, kRows);
      for (int64_t i = 0; i < times; ++i) {
        const int64_t row = count * i / times;
        multiply(count * (i + 1) / times - row, p, b, row);
      }
      for (int64_t i = 0; i < count; ++i) {
        float* values = b.acc + i * kLanes;
        write(values, scaled_sums<Int8Int4>(read<vfloat>(values), read<vfloat>(b.columns.sw),
                                            splat(b.scale[i]), read<vfloat>(b.columns.bias)));
      }
      put_rows(p, first, count, b.columns.begin, b.columns.count, b.acc, kLanes);
    }
  }

  static void fill(const Linear& p, const Buffers& b, int64_t first, int64_t count) {
    const int64_t stride = round_up(p.k, kLine);
    for (int64_t row = 0; row < count; ++row) {
      Code* codes = b.codes + row * stride;
      read_row<Int8Int4>(p, first + row, p.k, codes, b.scale + row);
      for (int64_t g = 0; g < b.groups; ++g) {
        Code* group = codes + g * p.weight.group;
        int32_t sum = 0;
        for (int64_t i = 0; i < p.weight.group; ++i) sum += group[i];
        b.sums[row * b.groups + g] = sum;
        for (int64_t i = 0; i < p.weight.group; i += kWord) {
          Code eight[kWord];
          for (int64_t j = 0; j < kWord / 2; ++j) {
            eight[j] = group[i + 2 * j];
            eight[kWord / 2 + j] = group[i + 2 * j + 1];
          }
          std::memcpy(group + i, eight, kWord);
        }
      }
    }
  }

  // The 32-bit words of kLanes rows, `words` in each, to [word][lane].
  static void turn_words(const void* from, int64_t rows, int64_t words, void* to) {
    const char* in = static_cast<const char*>(from);
    char* out = static_cast<char*>(to);
    constexpr int64_t kRow = kLanes * 4;
    for (int64_t word = 0; word < words; word += kLanes) {
      const char* here = in + word * 4;
      if (rows == kLanes && words - word >= kLanes) {
        // The next rows lie behind these, and are fetched meanwhile.
        for (int64_t r = 0; r < kLanes; ++r) __builtin_prefetch(here + (kLanes + r) * words * 4);
        M::transpose(here, words * 4, out + word * kRow, kRow);
      } else {
        alignas(64) char square[kLanes * kLanes * 4] = {};
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(square + r * kRow, here + r * words * 4, smaller(kLanes, words - word) * 4);
        M::transpose(square, kRow, out + word * kRow, kRow);
      }
    }
  }

  static void turn(const Linear& p, const Buffers& b) {
    const int64_t n = b.columns.begin, rows = b.columns.count;
    turn_words(p.w + n * p.weight.row_bytes(p.k), rows, p.k / kWord, b.panel.words);
    turn_words(static_cast<const float*>(p.group_scale) + n * b.groups, rows, b.groups,
               b.panel.scale);
    for (int64_t g = 0; g < b.groups; ++g) {
      for (int64_t r = 0; r < kLanes; ++r) {
        const bool stored = p.zero_points != nullptr && r < rows;
        b.panel.zero[g * kLanes + r] = stored ? p.zero_points[(n + r) * b.groups + g] : 8;
      }
    }
  }

  template <int R = kRows>
  static void multiply(int64_t rows, const Linear& p, const Buffers& b, int64_t row) {
    if (rows == R) {
      const int64_t stride = round_up(p.k, kLine);
      return block<R>(b.codes + row * stride, stride, b.sums + row * b.groups, b.panel, b.groups,
                      p.weight.group, b.acc + row * kLanes);
    }
    if constexpr (R > 1) multiply<R - 1>(rows, p, b, row);
  }

  template <int R>
  QNN_KERNEL static void block(const Code* x, int64_t stride, const int32_t* sums, Panel w,
                               int64_t groups, int64_t group, float* acc) {
    vfloat y[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) y[r] = vfloat{};
    for (int64_t g = 0; g < groups; ++g) {
      const vint zero = read<vint>(w.zero + g * kLanes);
      vint of_group[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) of_group[r] = -(zero * splat(sums[r * groups + g]));
      for (int64_t i = g * group; i < (g + 1) * group; i += 4 * kWord) {
        vint part[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) part[r] = vint{};
#pragma GCC unroll kUnrolled
        for (int64_t j = i; j < i + 4 * kWord; j += kWord) {
          const vuint words = read<vuint>(w.words + j / kWord * kLanes);
          const vuint even = words & 0x0f0f0f0f, odd = words >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) {
            const Code* eight = x + r * stride + j;
            part[r] = add_products(part[r], even, splat(read<int32_t>(eight)), odd,
                                   splat(read<int32_t>(eight + 4)));
          }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) of_group[r] += whole(part[r]);
      }
      const vfloat scale = read<vfloat>(w.scale + g * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) y[r] = y[r] + floats(of_group[r]) * scale;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) write(acc + r * kLanes, y[r]);
  }
};

template <class M>
constexpr Kernel int8_int4() {
  return {Int8Int4<M>::scratch_bytes, Int8Int4<M>::run};
}

}  // namespace
}  // namespace qnn

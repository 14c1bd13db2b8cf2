// Rows of a cache as products read them.
//
// A cache has one layout for all tiers, a row of codes a token, since it outlives a call: it is
// saved, cut, reordered and moved as any tensor. What a product wants is made on the way, for so
// many keys at a time, in the first-level cache: words of a key's codes in lanes of keys, and words
// of keys in lanes of channels. Few queries multiply keys as they lie, lanes along their codes.
#pragma once

#include "attention/cache.h"
#include "recurrent/products.h"

namespace qnn {
namespace {

// Lane i: the sum over the lanes of sums[i].
#if defined(__AVX512F__) && QNN_LANES == 16
QNN_INLINE vint sum_each(const vint* sums) {
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512i two[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const auto a = (__m512i)sums[4 * i + 2 * j], b = (__m512i)sums[4 * i + 2 * j + 1];
      two[j] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(two[0], two[1]),
                               _mm512_unpackhi_epi64(two[0], two[1]));
  }
  const auto halves = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  };
  const __m512i a = halves(four[0], four[1]), b = halves(four[2], four[3]);
  return (vint)_mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
#elif defined(__AVX2__) && QNN_LANES == 8
QNN_INLINE vint sum_each(const vint* sums) {
  __m256i four[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const auto* s = sums + 4 * i;
    four[i] = _mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)s[0], (__m256i)s[1]),
                                _mm256_hadd_epi32((__m256i)s[2], (__m256i)s[3]));
  }
  return (vint)_mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20),
                                _mm256_permute2x128_si256(four[0], four[1], 0x31));
}
#else
QNN_INLINE vint sum_each(const vint* sums) {
  vint total{};
  for (int i = 0; i < kLanes; ++i) {
    uint32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<uint32_t>(sums[i][lane]);
    total[i] = static_cast<int32_t>(sum);
  }
  return total;
}
#endif

template <class M>
struct CacheCodes {
  using P = IntegerProduct<M, 6, 6>;
  using Code = typename P::Code;  // of queries for panels, and of weights
  static constexpr bool kBytes = P::kShifts;
  static constexpr int64_t kGroup = M::kGroup, kWordOfLanes = kLanes * 4;
  // Vectors of keys or of channels in a panel, and the rows that meet it at once.
  static constexpr int kGroups = kBytes ? 4 : 2;
  static constexpr int64_t kTileRows = kBytes && kLanes == 8 ? 2 : 6;
  static constexpr int64_t kWide = kGroups * kLanes;  // keys, or channels
  static constexpr int64_t kTurn = 64;                // keys of a panel of values
  // Codes of a row of a query: whole vectors, and whole turns of words.
  static constexpr int64_t kStep = kGroup * kLanes;
  static_assert(kTurn % kWide == 0 && kTurn % kGroup == 0);
  // Codes are fetched so many bytes before they are read. 8 heads, µs on one Sapphire-Rapids core,
  // from the last-level cache: 512 × 96 keys 50 without and 44 with it, 4096 × 64 208 and 185, 4096
  // × 128 422 and 381; the same from the second-level cache.
  static constexpr int64_t kAhead = 4096;

  // sums [rows][kWide]: of each query, as rows of M::Code with sums of their codes, times kWide
  // keys from `keys` on, of which `there` may be read.
  QNN_KERNEL static void dots(const void* queries, int64_t stride, const int32_t* query_sums,
                              int64_t rows, const int8_t* keys, int64_t row, int64_t there,
                              int64_t depth, int32_t* sums) {
    using Query = typename M::Code;
    for (int64_t group = 0; group < kGroups; ++group) {
      const int8_t* at[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        at[lane] = keys + smaller(group * kLanes + lane, there - 1) * row;
        for (int64_t i = 0; i < depth; i += kLine) __builtin_prefetch(at[lane] + kAhead + i);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const auto* query = static_cast<const Query*>(queries) + r * stride;
        vint each[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) each[lane] = vint{};
        int64_t i = 0;
        for (; i + kStep <= depth; i += kStep) {
          const vint codes = read<vint>(query + i);
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes; ++lane)
            each[lane] = M::multiply_add(each[lane], M::column(at[lane] + i, kStep), codes);
        }
        if (i < depth) {
          const vint codes = read<vint>(query + i);
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes; ++lane)
            each[lane] = M::multiply_add(each[lane], M::column(at[lane] + i, depth - i), codes);
        }
        const vuint offset =
            vuint{} + static_cast<uint32_t>(query_sums[r]) * static_cast<uint32_t>(M::kOffset);
        write(sums + r * kWide + group * kLanes, (vint)((vuint)sum_each(each) - offset));
      }
    }
  }

  // The same of keys in a panel [word][kGroups][key], for queries as P has them: their codes, or
  // these + 128, where sums start at −128 · Σ keys.
  static void key_panel(const int8_t* keys, int64_t row, int64_t there, int64_t depth, char* staged,
                        char* panel, int32_t* start) {
    const int64_t words = round_up(div_up(depth, kGroup), kLanes), bytes = words * 4;
    for (int64_t group = 0; group < kGroups; ++group) {
      const int64_t first = group * kLanes;
      const char* from = reinterpret_cast<const char*>(keys + first * row);
      int64_t stride = row;
      if (!kBytes || depth % kStep != 0 || first + kLanes > there) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int8_t* key = keys + smaller(first + lane, there - 1) * row;
          for (int64_t i = 0; i < depth; i += kStep)
            P::widen(key + i, depth - i, staged + lane * bytes + i / kGroup * 4);
        }
        from = staged, stride = bytes;
      }
      char* to = panel + group * kWordOfLanes;
      for (int64_t word = 0; word < words; word += kLanes)
        M::transpose(from + word * 4, stride, to + word * kGroups * kWordOfLanes,
                     kGroups * kWordOfLanes);
      vint total{};
      if constexpr (kBytes) {
        for (int64_t word = 0; word < words; ++word)
          total = P::sum_of_codes(total, read<vint>(to + word * kGroups * kWordOfLanes));
      }
      write(start + first, total * -128);
    }
  }

  // kTurn keys of kWide channels: [word of keys][kGroups][channel, in the order of channel_at]. Of
  // the keys `there` may be read, and of their channels `left`; others are 0.
  QNN_KERNEL static void value_panel(const int8_t* values, int64_t row, int64_t there, int64_t left,
                                     char* panel) {
    for (int64_t word = 0; word < kTurn / kGroup; ++word) {
      alignas(64) int8_t some[kGroup][kWide];
      const int8_t* rows[kGroup];
      for (int64_t i = 0; i < kGroup; ++i) {
        const int64_t key = word * kGroup + i;
        rows[i] = values + key * row;
        for (int64_t line = 0; line < kWide; line += kLine)
          __builtin_prefetch(rows[i] + kAhead + line);
        // Of a channel that is not there the lane holds something, which nobody reads.
        if (key < there && (left >= kWide || (there - 1 - key) * row >= kWide - left)) continue;
        std::memset(some[i], 0, kWide);
        if (key < there) std::memcpy(some[i], rows[i], left);
        rows[i] = some[i];
      }
      join(rows, panel + word * kGroups * kWordOfLanes);
    }
  }

  // Where the `i`th lane of kGroups · kLanes of a panel of values comes from.
  static int64_t channel_at(int64_t i) {
#if defined(__AVX2__)
    if constexpr (kBytes) return i / kLanes * 4 + i % kLanes / 4 * 16 + i % 4;
#endif
    return i;
  }

 private:
  static void join(const int8_t* const* rows, char* to) {
#if defined(__AVX512BW__) && QNN_LANES == 16
    if constexpr (kBytes) {
      const auto at = [&](int i) { return read<__m512i>(rows[i]); };
      const __m512i a = _mm512_unpacklo_epi8(at(0), at(1)), b = _mm512_unpackhi_epi8(at(0), at(1)),
                    c = _mm512_unpacklo_epi8(at(2), at(3)), d = _mm512_unpackhi_epi8(at(2), at(3));
      write(to, _mm512_unpacklo_epi16(a, c)), write(to + 64, _mm512_unpackhi_epi16(a, c));
      write(to + 128, _mm512_unpacklo_epi16(b, d)), write(to + 192, _mm512_unpackhi_epi16(b, d));
      return;
    }
#elif defined(__AVX2__) && QNN_LANES == 8
    if constexpr (kBytes) {
      const auto at = [&](int i) { return read<__m256i>(rows[i]); };
      const __m256i a = _mm256_unpacklo_epi8(at(0), at(1)), b = _mm256_unpackhi_epi8(at(0), at(1)),
                    c = _mm256_unpacklo_epi8(at(2), at(3)), d = _mm256_unpackhi_epi8(at(2), at(3));
      write(to, _mm256_unpacklo_epi16(a, c)), write(to + 32, _mm256_unpackhi_epi16(a, c));
      write(to + 64, _mm256_unpacklo_epi16(b, d)), write(to + 96, _mm256_unpackhi_epi16(b, d));
      return;
    }
#endif
    constexpr int kBits = 32 / kGroup;
    constexpr int32_t kMask = kBits == 8 ? 255 : 65535;
    for (int64_t group = 0; group < kGroups; ++group) {
      vint words{};
      for (int i = 0; i < kGroup; ++i) {
        const auto codes = __builtin_convertvector(read<vbyte>(rows[i] + group * kLanes), vint);
        words |= (codes & kMask) << (i * kBits);
      }
      write(to + group * kWordOfLanes, words);
    }
  }
};

}  // namespace
}  // namespace qnn

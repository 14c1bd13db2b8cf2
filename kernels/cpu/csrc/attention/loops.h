// The loops of attention in integers, for all tiers.
//
// Keys are packed as [group of keys][word of a key's codes][lane: a key], values as [group of
// channels][word of keys][lane: a channel], where kGroups groups are taken together; queries and
// weights are rows of codes, whose words are broadcast: so one product serves for both. By bytes
// (VNNI) a query's codes are sent as q + 128, so that sums start at −128 · Σk, and the 15-bit
// weights in two planes; by 16 bits both are as they are.
#pragma once

#include "attention/packing.h"

namespace qnn {
namespace {
template <class M>
struct Attend : PackedHeads<M> {
  using Heads = PackedHeads<M>;
  using Heads::kBytes;
  using Heads::kGroup;
  using Heads::kGroups;
  using Heads::kKeys;
  using Heads::kPlanes;
  using Heads::kRows;
  using Heads::kTileRows;
  using Heads::kTurn;
  using Heads::kWordOfLanes;
  using typename Heads::Code;
  using typename Heads::P;
  using typename Heads::Packed;
  using typename Heads::Packing;
  using typename Heads::Sizes;

  // Of a thread that works on rows.
  struct Block {
    Block(const Attention& p, const Sizes& s, char* base) : scratch(base) {
      floats = scratch.take<float>(s.codes);
      q = scratch.take<Code>(s.rows * s.codes);
      scores = scratch.take<int32_t>(s.rows * s.keys);
      weights = scratch.take<Code>(kPlanes * s.rows * s.keys);
      (void)p;
    }
    Scratch scratch;
    float* floats;
    Code *q, *weights;
    int32_t* scores;
    float scale[kRows], part[kRows];
    vint most[kRows];
  };
  static size_t head_bytes(const Attention& p) {
    return Packed(p, Sizes(p), nullptr).scratch.used();
  }
  static size_t scratch_bytes(const Attention& p) {
    const Sizes s(p);
    const size_t packing = Packing(p, s, nullptr).scratch.used(),
                 block = Block(p, s, nullptr).scratch.used();
    return packing < block ? block : packing;
  }
  static void rows(const Attention& p, int64_t head, int64_t first, int64_t count,
                   const char* packed, char* scratch) {
    const Sizes s(p);
    const Packed keys(p, s, const_cast<char*>(packed));
    Block b(p, s, scratch);
    const int64_t each = head % p.h % p.each();
    for (int64_t row = first; row < first + count; row += s.rows) {
      const int64_t some = smaller(s.rows, first + count - row);
      const int64_t limit = p.causal ? smaller(p.n, row + some) : p.n;
      score(p, s, head, row, some, limit, keys, b);
      const int64_t turned = round_up(limit, kTurn);
      for (int64_t r = 0; r < some; ++r) {
        int32_t most = kHidden;
        for (int lane = 0; lane < kLanes; ++lane) most = larger(most, b.most[r][lane]);
        const int64_t total = weigh_row(s, b, r, most, keys.gain + each * s.keys, turned);
        b.part[r] = most == kNanScore ? NAN
                    : most == kHidden ? 0.0f
                                      : 1.0f / static_cast<float>(total);
      }
      constexpr float kStep = 32768.0f / 32767.0f;
      average(p, s, head, row, some, limit, keys, keys.top[each] * kStep, b);
    }
  }

  QNN_KERNEL static int64_t weigh_row(const Sizes& s, const Block& b, int64_t row, int32_t most,
                                      const int16_t* gain, int64_t keys) {
    Code* to = b.weights + row * s.keys;
    const int64_t plane = s.rows * s.keys;
    if (most == kHidden || most == kNanScore) {
      for (int64_t i = 0; i < kPlanes; ++i) std::memset(to + i * plane, 0, keys * sizeof(Code));
      return 1;
    }
    return weigh(b.scores + row * s.keys, most, gain, keys, [&](int64_t key, Shorts::V w) {
      if constexpr (kBytes) {
        Shorts::store(to + key, to + plane + key, w);
      } else {
        Shorts::store(to + key, w);
      }
    });
  }

  template <int G, class... Given>
  static void multiply(int64_t groups, Given... given) {
    if (groups == G) return P::template rows<G>(given...);
    if constexpr (G > 1) multiply<G - 1>(groups, given...);
  }

  // Scores of rows, and the largest of each.
  static void score(const Attention& p, const Sizes& s, int64_t head, int64_t row, int64_t count,
                    int64_t limit, const Packed& keys, Block& b) {
    const int64_t at = head / p.h * p.q.batch + head % p.h * p.q.head;
    const bool masked = p.mask.values != nullptr;
    const int64_t groups = div_up(limit, kLanes), turned = round_up(limit, kTurn);
    for (int64_t r = 0; r < count; ++r) {
      const float scale =
          Heads::read_row(p, p.q.values, at + (row + r) * p.q.row, p.d, s.codes, b.floats);
      const float inverse = Heads::inverse_of(scale);
      for (int64_t i = 0; i < s.codes; i += kLanes) {
        const vint codes = inverse > 0.0f ? Heads::codes_at(b.floats + i, inverse) : vint{};
        write_codes(b.q + r * s.codes + i, kBytes ? codes + 128 : codes);
      }
      b.scale[r] = scale * p.unit;
      b.most[r] = splat(kHidden);
      int32_t* scores = b.scores + r * s.keys;
      if (masked) {
        // Where the scores will be; the row before has it, where queries share it.
        auto* added = reinterpret_cast<float*>(scores);
        if (r > 0 && p.mask.row == 0) {
          std::memcpy(added, added - s.keys, turned * sizeof *added);
        } else {
          Heads::mask_row(p, head, row + r, turned, added);
        }
      }
      for (int64_t key = groups * kLanes; key < turned; ++key) scores[key] = kHidden;
    }
    alignas(64) int32_t sums[kRows * kGroups * kLanes];
    const int64_t tiles = div_up(count, kTileRows);
    // No score is then a NaN or beyond the limit.
    const float bound = 127.0f * 127.0f * static_cast<float>(p.d) * *keys.most;
    bool calm = !masked;
    for (int64_t r = 0; r < count; ++r) {
      const float scale = b.scale[r] < 0.0f ? -b.scale[r] : b.scale[r];
      calm &= bound * scale < static_cast<float>(kLimit / 2);
    }
    for (int64_t first = 0; first < groups; first += kGroups) {
      // Keys were packed so many groups at a time; the last ones may not be asked for.
      const int64_t together = smaller(kGroups, s.key_groups - first);
      const int64_t end = (first + together) * kLanes;
      const bool edge = end > (p.causal ? smaller(p.n, row + 1) : p.n);
      const char* panel = keys.k + first * s.padded_words * kWordOfLanes;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t r = count * tile / tiles, some = count * (tile + 1) / tiles - r;
        multiply<kGroups>(together, some, b.q + r * s.codes, s.codes, panel,
                          keys.start + first * kLanes, s.words, sums + r * together * kLanes);
      }
      const Tile t{&p,
                   sums,
                   keys.scale + first * kLanes,
                   b.scale,
                   b.most,
                   b.scores + first * kLanes,
                   s.keys,
                   count,
                   together,
                   first * kLanes,
                   row};
      if (calm) {
        edge ? finish<false, true, true>(t) : finish<false, false, true>(t);
      } else {
        masked ? finish<true, true, false>(t) : finish<false, true, false>(t);
      }
    }
  }

  struct Tile {
    const Attention* p;
    const int32_t* sums;
    const float *key_scale, *scale;
    vint* most;
    int32_t* scores;
    int64_t stride, rows, groups, key, row;
  };

  // From sums to scores. Where all are calm they need no limit, and no look for NaN.
  template <bool kMasked, bool kEdge, bool kCalm>
  QNN_KERNEL static void finish(const Tile& given) {
    const Tile t = given;  // the stores below could alias it
    vint iota{};
    for (int lane = 0; lane < kLanes; ++lane) iota[lane] = lane;
    for (int64_t r = 0; r < t.rows; ++r) {
      const vfloat scale = splat(t.scale[r]);
      const vint end = splat(
          static_cast<int32_t>((t.p->causal ? smaller(t.p->n, t.row + r + 1) : t.p->n) - t.key));
      vint most = t.most[r];
      for (int64_t g = 0; g < t.groups; ++g) {
        int32_t* to = t.scores + r * t.stride + g * kLanes;
        vfloat value = floats(read<vint>(t.sums + (r * t.groups + g) * kLanes)) *
                       read<vfloat>(t.key_scale + g * kLanes) * scale;
        vint hidden{};
        if constexpr (kMasked) {
          const vfloat added = read<vfloat>(to);
          hidden = added == splat(-INFINITY);
          value = value + added;
        }
        if constexpr (kEdge) hidden |= iota + static_cast<int32_t>(g * kLanes) >= end;
        constexpr auto kMost = static_cast<float>(kLimit);
        vint score;
        if constexpr (kCalm) {
          score = rounded(value);
        } else {
          score = rounded(at_most(splat(kMost), at_least(splat(-kMost), value)));
          score = value != value ? splat(kNanScore) : score;
        }
        if constexpr (kMasked || kEdge) score = hidden ? splat(kHidden) : score;
        most = score > most ? score : most;
        write(to, score);
      }
      t.most[r] = most;
    }
  }

  // y = sums of weights times values.
  static void average(const Attention& p, const Sizes& s, int64_t head, int64_t row, int64_t count,
                      int64_t limit, const Packed& keys, float factor, Block& b) {
    constexpr int64_t kSums = kTileRows * kGroups * kLanes;
    alignas(64) int32_t sums[kSums], low[kSums];
    alignas(64) double totals[kSums];
    alignas(64) float values[kSums];
    const int32_t zeros[kGroups * kLanes] = {};
    const int64_t tiles = div_up(count, kTileRows), plane = s.rows * s.keys;
    for (int64_t first = 0; first < s.channel_groups; first += kGroups) {
      const int64_t groups = smaller(kGroups, s.channel_groups - first);
      const char* panel = keys.v + first * s.value_words * kWordOfLanes;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t r = count * tile / tiles, some = count * (tile + 1) / tiles - r,
                      made = some * groups * kLanes;
        for (int64_t key = 0; key < limit; key += kKeys) {
          const int64_t words = div_up(smaller(kKeys, limit - key), kGroup);
          const char* from = panel + key / kGroup * groups * kWordOfLanes;
          const Code* weights = b.weights + r * s.keys + key;
          multiply<kGroups>(groups, some, weights, s.keys, from, zeros, words, sums);
          if constexpr (kBytes) {
            multiply<kGroups>(groups, some, weights + plane, s.keys, from, zeros, words, low);
            add_planes(sums, low, made, key > 0, totals);
          } else if (limit > kKeys) {
            add_sums(sums, made, key > 0, totals);
          }
        }
        const bool whole = !kBytes && limit <= kKeys;
        finish_values(whole ? sums : nullptr, totals, groups, some, b.part + r, factor, values);
        put(p, head, row + r, some, first * kLanes, groups * kLanes, values);
      }
    }
  }

  // 256 · high + low, exactly.
  QNN_KERNEL static void add_planes(const int32_t* high, const int32_t* low, int64_t count,
                                    bool onto, double* to) {
    const vhalfdouble step = vhalfdouble{} + 256.0;
    for (int64_t i = 0; i < count; i += kLanes / 2) {
      const auto upper = __builtin_convertvector(read<vhalfint>(high + i), vhalfdouble);
      const auto lower = __builtin_convertvector(read<vhalfint>(low + i), vhalfdouble);
      const vhalfdouble both = upper * step + lower;
      write(to + i, onto ? read<vhalfdouble>(to + i) + both : both);
    }
  }

  // The sums, in 32 bits or in double, to float32, over the sum of the weights, in V's unit.
  QNN_KERNEL static void finish_values(const int32_t* sums, const double* totals, int64_t groups,
                                       int64_t rows, const float* part, float factor,
                                       float* values) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t i = (r * groups + g) * kLanes;
        if (sums != nullptr) {
          write(values + i, floats(read<vint>(sums + i)));
        } else {
          for (int64_t half = i; half < i + kLanes; half += kLanes / 2)
            write(values + half,
                  __builtin_convertvector(read<vhalfdouble>(totals + half), vhalffloat));
        }
        write(values + i, read<vfloat>(values + i) * splat(part[r]) * splat(factor));
      }
    }
  }

  // Rows of so many columns of y from `column` on.
  static void put(const Attention& p, int64_t head, int64_t row, int64_t rows, int64_t column,
                  int64_t columns, const float* values) {
    const int64_t count = smaller(columns, p.e - column);
    with_format(p.dtype, [&](auto format) {
      using Format = decltype(format);
      auto* y = static_cast<typename Format::Value*>(p.y);
      for (int64_t r = 0; r < rows; ++r) {
        auto* to = y + ((head / p.h * p.m + row + r) * p.h + head % p.h) * p.e + column;
        for (int64_t i = 0; i < count; i += kLanes)
          store_some<Format>(to + i, read<vfloat>(values + r * columns + i), count - i);
      }
    });
  }
};

template <class M>
constexpr AttentionKernel attention() {
  using A = Attend<M>;
  return {A::head_bytes, A::scratch_bytes, A::pack, A::rows};
}

}  // namespace
}  // namespace qnn

// The loops of attention in integers, for all tiers.
//
// Keys are packed as [group of keys][word of a key's codes][lane: a key], values as [group of
// channels][word of keys][lane: a channel], where kGroups groups are taken together; queries and
// weights are rows of codes, whose words are broadcast: so one product serves for both. By bytes
// the 15-bit weights are two planes; by 16 bits they are as they are.
//
// Scores are kept in 16 bits, as what counts is how far they lie below the largest of their row: a
// weight is 0 from 2^14 on. As they are where the largest lies within [-2^14 + 1, 2^15 - 2], which
// is known once they are there; else they are computed once more for the largest, and then less it.
#pragma once

#include "attention/packing.h"

namespace qnn {
namespace {

template <class P>
struct Attend : PackedHeads<P> {
  using Heads = PackedHeads<P>;
  using Heads::kBytes;
  using Heads::kFew;
  using Heads::kGroup;
  using Heads::kGroups;
  using Heads::kKeys;
  using Heads::kPlanes;
  using Heads::kTurn;
  using Heads::kWordOfLanes;
  using typename Heads::Code;
  using typename Heads::Packed;
  using typename Heads::Packing;
  using typename Heads::Quantized;
  using typename Heads::Sizes;
  using Score = Shorts::Score;
  static constexpr int64_t kTileRows = P::kTileRows, kRows = round_up(P::kRows, kLanes);
  static constexpr int32_t kLeast = -(1 << 14) + 1, kMost = (1 << 15) - 2;

  // Of kFew keys, the weights of the rows of a tile.
  static constexpr int64_t kStride = kFew + kLine / static_cast<int64_t>(sizeof(Code)),
                           kPlane = kTileRows * kStride;

  // Of a thread that works on rows.
  struct Block {
    Block(const Attention& p, const Sizes& s, char* base) : scratch(base) {
      q = scratch.take<Quantized>(round_up(s.rows, kLanes) * s.codes);
      scores = scratch.take<Score>(s.rows * s.stride);
      weights = scratch.take<Code>(kPlanes * kPlane);
      const int64_t masks = p.mask.values == nullptr ? 0 : p.mask.row == 0 ? 1 : s.rows;
      added = scratch.take<float>(masks * s.keys);
      const int64_t sums = kTileRows * round_up(s.channel_groups, kGroups) * kLanes;
      high = scratch.take<int32_t>(sums), low = scratch.take<int32_t>(sums);
      totals = scratch.take<double>(sums);
    }
    Scratch scratch;
    Quantized* q;
    Score* scores;
    Code* weights;
    float* added;         // to scores, by the mask
    int32_t *high, *low;  // sums of the weights' planes times values; the first of words of 16 bits
    double* totals;       // of both
    alignas(64) float scale[kRows];
    alignas(64) int32_t most[kRows];   // of each row, kHidden or kNanScore for one without weights
    alignas(64) vint largest[kRows];   // by lanes
    alignas(64) Shorts::V top[kRows];  // in 16 bits
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
    const typename P::Session session;
    const Sizes s(p);
    const Packed keys(p, s, const_cast<char*>(packed));
    Block b(p, s, scratch);
    const int64_t each = head % p.h % p.each();
    if (p.mask.values != nullptr && p.mask.row == 0) Heads::mask_row(p, head, 0, s.keys, b.added);
    for (int64_t row = first; row < first + count; row += s.rows) {
      const int64_t some = smaller(s.rows, first + count - row);
      const int64_t limit = p.causal ? smaller(p.n, row + some) : p.n;
      const Panels t{&p, &s, &keys, head, row, some, limit};
      quantize_queries(t, b);
      score(t, b);
      constexpr float kStep = 32768.0f / 32767.0f;
      average(t, keys.gain + each * s.keys, keys.top[each] * kStep, b);
    }
  }

  // Rows of a head, which see keys up to `limit`.
  struct Panels {
    const Attention* p;
    const Sizes* s;
    const Packed* keys;
    int64_t head, row, count, limit;
    int64_t turned() const { return round_up(limit, kTurn); }
  };

  static void quantize_queries(const Panels& t, Block& b) {
    const Attention& p = *t.p;
    const int64_t at = t.head / p.h * p.q.batch + t.head % p.h * p.q.head;
    for (int64_t r = 0; r < t.count; r += kLanes) {
      Quantized* to = b.q + r * t.s->codes;
      Heads::quantize(p, p.q, at + (t.row + r) * p.q.row, smaller(kLanes, t.count - r), p.d, to,
                      t.s->codes, b.scale + r);
      write(b.scale + r, read<vfloat>(b.scale + r) * p.unit);
      if constexpr (!P::kSigned) {
        constexpr int32_t kFlip = static_cast<int32_t>(0x80808080);
        for (int64_t i = 0; i < kLanes * t.s->codes; i += 4 * kLanes)
          write(to + i, read<vint>(to + i) ^ kFlip);
      }
    }
    if (p.mask.values == nullptr || p.mask.row == 0) return;
    for (int64_t r = 0; r < t.count; ++r)
      Heads::mask_row(p, t.head, t.row + r, t.turned(), b.added + r * t.s->keys);
  }

  // Of what one look over all keys is to find.
  enum class Look { scores, largest };

  // Scores of rows, and the largest of each.
  static void score(const Panels& t, Block& b) {
    // No score is then a NaN or beyond the limit.
    const float bound = 127.0f * 127.0f * static_cast<float>(t.p->d) * *t.keys->most;
    const bool masked = t.p->mask.values != nullptr;
    bool calm = !masked;
    for (int64_t r = 0; r < t.count; ++r) {
      const float scale = b.scale[r] < 0.0f ? -b.scale[r] : b.scale[r];
      calm &= bound * scale < static_cast<float>(kLimit / 2);
      b.most[r] = 0;
      b.top[r] = Shorts::splat(-32768);
    }
    if (calm) {
      look(t, b, finish<false, false, true, Look::scores>, finish<false, true, true, Look::scores>);
    } else {
      const auto each = masked ? finish<true, true, false, Look::scores>
                               : finish<false, true, false, Look::scores>;
      look(t, b, each, each);
    }
    for (int64_t r = 0; r < t.count; r += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) b.largest[r + i] = Shorts::widened(b.top[r + i]);
      write(b.most + r, fold<P>(b.largest + r, largest));
    }
    bool fit = true;
    for (int64_t r = 0; r < t.count; ++r) fit &= b.most[r] >= kLeast && b.most[r] <= kMost;
    if (fit) return;
    for (int64_t r = 0; r < t.count; ++r) b.largest[r] = splat(kHidden);
    const auto find = masked ? finish<true, true, false, Look::largest>
                             : finish<false, true, false, Look::largest>;
    look(t, b, find, find);
    for (int64_t r = 0; r < t.count; r += kLanes)
      write(b.most + r, fold<P>(b.largest + r, largest));
    const auto again =
        masked ? finish<true, true, false, Look::scores> : finish<false, true, false, Look::scores>;
    look(t, b, again, again);
    for (int64_t r = 0; r < t.count; ++r) {
      if (b.most[r] != kHidden && b.most[r] != kNanScore) b.most[r] = 0;
    }
  }

  template <int G, class... Given>
  static void multiply_keys(int64_t groups, Given... given) {
    if (groups == G) return P::template scores<G>(given...);
    if constexpr (G > 1) multiply_keys<G - 1>(groups, given...);
  }
  template <int G, class... Given>
  static void multiply_values(int64_t groups, Given... given) {
    if (groups == G) return P::template values<G>(given...);
    if constexpr (G > 1) multiply_values<G - 1>(groups, given...);
  }

  struct Tile {
    const Panels* t;
    Block* b;
    const int32_t* sums;
    int64_t groups, key;  // the first of them
  };

  template <class Finish>
  static void look(const Panels& t, Block& b, const Finish& inner, const Finish& edge) {
    const Sizes& s = *t.s;
    // In turns: the sums of a panel are made while those of the one before become scores.
    alignas(64) int32_t sums[2][kRows * kGroups * kLanes];
    const int64_t groups = round_up(div_up(t.limit, kLanes), Shorts::kVectors);
    const int64_t tiles = div_up(t.count, kTileRows);
    const int64_t all = t.p->causal ? smaller(t.p->n, t.row + 1) : t.p->n;  // every row sees them
    Tile before{};
    const auto finish_before = [&] {
      if (before.groups > 0) (before.key + before.groups * kLanes > all ? edge : inner)(before);
    };
    for (int64_t first = 0; first < groups; first += kGroups) {
      // Keys were packed so many groups at a time; the last ones may not be asked for.
      const int64_t together = smaller(kGroups, s.key_groups - first);
      const char* panel = t.keys->k + first * s.padded_words * kWordOfLanes;
      int32_t* to = sums[first / kGroups % 2];
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t r = tile * t.count / tiles, some = (tile + 1) * t.count / tiles - r;
        multiply_keys<kGroups>(together, some, reinterpret_cast<const Code*>(b.q + r * s.codes),
                               s.codes, panel, t.keys->start + first * kLanes, s.words,
                               to + r * together * kLanes);
      }
      finish_before();
      before = {&t, &b, to, together, first * kLanes};
    }
    finish_before();
    // What is after them is hidden.
    const int64_t done = smaller(round_up(groups, kGroups), s.key_groups) * kLanes;
    for (int64_t key = done; key < t.turned(); key += Shorts::kCount) {
      for (int64_t r = 0; r < t.count; ++r)
        Shorts::store(b.scores + r * s.stride + key, Shorts::splat(-32768));
    }
  }

  // From sums to scores. Where all are calm they need no limit, and no look for NaN.
  template <bool kMasked, bool kEdge, bool kCalm, Look kLook>
  QNN_KERNEL static void finish(const Tile& tile) {
    const Attention& p = *tile.t->p;
    Block& b = *tile.b;
    const int64_t row = tile.t->row, count = tile.t->count, groups = tile.groups, key = tile.key,
                  stride = tile.t->s->stride;
    const float* key_scale = tile.t->keys->scale + key;
    const float* scales = b.scale;
    const int32_t* sums = tile.sums;
    const int64_t mask_stride = kMasked && p.mask.row != 0 ? tile.t->s->keys : 0;
    const float* mask = b.added + key;
    Score* to = b.scores + key;
    Shorts::V* tops = b.top;
    vint* all = b.largest;
    vint iota{};
    for (int lane = 0; lane < kLanes; ++lane) iota[lane] = lane;
    for (int64_t r = 0; r < count; ++r) {
      const vfloat scale = splat(scales[r]);
      const vint end =
          splat(static_cast<int32_t>((p.causal ? smaller(p.n, row + r + 1) : p.n) - key));
      const vint from = splat(b.most[r]);
      Shorts::V top = tops[r];
      vint most = all[r];
      for (int64_t g = 0; g < groups; g += Shorts::kVectors) {
        vint u[Shorts::kVectors];
        for (int64_t j = 0; j < Shorts::kVectors; ++j) {
          const int64_t at = (g + j) * kLanes;
          vfloat value = floats(read<vint>(sums + r * groups * kLanes + at)) *
                         read<vfloat>(key_scale + at) * scale;
          vint hidden{};
          if constexpr (kMasked) {
            const vfloat added = read<vfloat>(mask + r * mask_stride + at);
            hidden = added == splat(-INFINITY);
            value = value + added;
          }
          if constexpr (kEdge) hidden |= iota + static_cast<int32_t>(at) >= end;
          vint score;
          if constexpr (kCalm) {
            score = rounded(value);
          } else {
            constexpr auto kEnd = static_cast<float>(kLimit);
            score = rounded(at_most(splat(kEnd), at_least(splat(-kEnd), value)));
            score = value != value ? splat(kNanScore) : score;
          }
          if constexpr (kMasked || kEdge) score = hidden ? splat(kHidden) : score;
          if constexpr (kLook == Look::largest) most = largest(score, most);
          u[j] = kCalm ? score : score - from;
        }
        if constexpr (kLook == Look::scores) {
          const Shorts::V packed = Shorts::pack<P::kMixes>(u);
          Shorts::store(to + r * stride + g * kLanes, packed);
          top = Shorts::most(top, packed);
        }
      }
      if constexpr (kLook == Look::scores) {
        tops[r] = top;
      } else {
        all[r] = most;
      }
    }
  }

  // Weights of keys from `key` on. Returns their sums by lanes.
  QNN_KERNEL static vint weigh_row(const Panels& t, const Block& b, int64_t row, Code* to,
                                   int64_t key, const int16_t* gain, int64_t keys) {
    const int32_t most = b.most[row];
    if (most == kHidden || most == kNanScore) {
      for (int64_t i = 0; i < kPlanes; ++i) std::memset(to + i * kPlane, 0, keys * sizeof(Code));
      return vint{};
    }
    const Score* scores = b.scores + row * t.s->stride + key;
    return weigh(scores, most, gain + key, keys, [&](int64_t i, Shorts::V w, Shorts::V next) {
      if constexpr (kBytes) {
        Shorts::store<P::kMixes>(to + i, to + kPlane + i, w, next);
      } else {
        Shorts::store(to + i, w), Shorts::store(to + i + Shorts::kCount, next);
      }
    });
  }

  // y = sums of weights times values, over the sum of the weights.
  static void average(const Panels& t, const int16_t* gain, float factor, Block& b) {
    const Sizes& s = *t.s;
    constexpr int64_t kSums = kTileRows * kGroups * kLanes,
                      kTileLanes = round_up(kTileRows, kLanes);
    const int64_t panels = div_up(s.channel_groups, kGroups);
    alignas(64) float values[kSums];
    const bool few = t.limit <= kFew;
    const int64_t tiles = div_up(t.count, kTileRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t r = tile * t.count / tiles, some = (tile + 1) * t.count / tiles - r;
      alignas(64) vint sums[kTileLanes] = {};
      int64_t total[kTileLanes] = {};
      for (int64_t key = 0; key < t.limit; key += kFew) {
        const int64_t left = smaller(kFew, t.limit - key), keys = round_up(left, kTurn),
                      words = (P::kMixes ? keys : round_up(left, kGroup)) / kGroup,
                      within = key % kKeys;
        for (int64_t i = 0; i < some; ++i)
          sums[i] += weigh_row(t, b, r + i, b.weights + i * kStride, key, gain, keys);
        const bool last = key + kFew >= t.limit || within + kFew == kKeys;
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t first = panel * kGroups,
                        groups = smaller(kGroups, s.channel_groups - first);
          const char* from =
              t.keys->v + (first * s.value_words + key / kGroup * groups) * kWordOfLanes;
          int32_t *high = b.high + panel * kSums, *low = b.low + panel * kSums;
          multiply_values<kGroups>(groups, some, b.weights, kPlane, kStride, from, words,
                                   within > 0, high, low);
          if (few || !last) continue;
          double* totals = b.totals + panel * kSums;
          const int64_t made = some * groups * kLanes;
          if constexpr (kBytes) {
            add_planes(high, low, made, key >= kKeys, totals);
          } else {
            add_sums(high, made, key >= kKeys, totals);
          }
        }
        if (!last) continue;
        for (int64_t i = 0; i < some; i += kLanes) {
          alignas(64) int32_t lanes[kLanes];
          write(lanes, fold<P>(sums + i, added));
          for (int64_t j = 0; j < kLanes; ++j) total[i + j] += lanes[j], sums[i + j] = vint{};
        }
      }
      alignas(64) float part[kTileLanes];
      for (int64_t i = 0; i < some; ++i) {
        const int32_t most = b.most[r + i];
        part[i] = most == kNanScore ? NAN
                  : most == kHidden ? 0.0f
                                    : 1.0f / static_cast<float>(total[i]);
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = panel * kGroups, groups = smaller(kGroups, s.channel_groups - first);
        finish_values(few ? b.high + panel * kSums : nullptr, b.low + panel * kSums,
                      b.totals + panel * kSums, groups, some, part, factor, values);
        put(*t.p, t.head, t.row + r, some, first * kLanes, groups * kLanes, values);
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
  QNN_KERNEL static void finish_values(const int32_t* sums, const int32_t* low,
                                       const double* totals, int64_t groups, int64_t rows,
                                       const float* part, float factor, float* values) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t i = (r * groups + g) * kLanes;
        vfloat value;
        if (sums != nullptr) {
          vint both = read<vint>(sums + i);
          if constexpr (kBytes) both = both * 256 + read<vint>(low + i);
          value = floats(both);
        } else {
          for (int64_t half = i; half < i + kLanes; half += kLanes / 2)
            write(values + half,
                  __builtin_convertvector(read<vhalfdouble>(totals + half), vhalffloat));
          value = read<vfloat>(values + i);
        }
        write(values + i, value * splat(part[r]) * splat(factor));
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

template <class P>
constexpr AttentionKernel attention() {
  using A = Attend<P>;
  return {A::head_bytes, A::scratch_bytes, A::pack, A::rows};
}

}  // namespace
}  // namespace qnn

// The loops of attention in integers, for all tiers.
//
// Keys are packed as [group of keys][word of a key's codes][lane: a key], values as [group of
// channels][word of keys][lane: a channel], where kGroups groups are taken together; queries and
// weights are rows of codes, whose words are broadcast: so one product serves for both. By bytes
// (VNNI) a query's codes are sent as q + 128, so that sums start at −128 · Σk, and the 15-bit
// weights in two planes; by 16 bits both are as they are.
#pragma once

#include <cfloat>
#include <cmath>  // NAN

#include "attention/attention.h"
#include "attention/weights.h"
#include "recurrent/products.h"

namespace qnn {
namespace {

template <class M>
struct Attend {
  using P = IntegerProduct<M, 6, 6>;
  using Code = typename P::Code;  // of queries and weights
  static constexpr bool kBytes = P::kShifts;
  static constexpr int64_t kGroup = M::kGroup, kGroups = kLanes == 16 ? 4 : 2, kTileRows = 6,
                           kRows = 24, kPlanes = kBytes ? 2 : 1;
  static constexpr int64_t kWordOfLanes = kLanes * 4;
  // Sums of so many keys stay in 32 bits: 32640 · 127 · 512, and 255 · 127 · 65536.
  static constexpr int64_t kKeys = kBytes ? 65536 : 512;
  static constexpr int64_t kTurn = 64;  // keys are padded to it
  static_assert(kTurn % Shorts::kCount == 0);

  struct Sizes {
    explicit Sizes(const Attention& p)
        : keys(round_up(p.n, kTurn)),
          key_groups(div_up(p.n, kLanes)),
          words(div_up(p.d, kGroup)),
          padded_words(round_up(words, kLanes)),
          codes(padded_words * kGroup),
          channel_groups(div_up(p.e, kLanes)),
          value_words(div_up(p.n, kGroup)) {
      // Few rows where there are many keys: scores and weights stay in the second-level cache.
      constexpr int64_t kBytesOfRows = 1 << 18;
      const int64_t fit = kBytesOfRows / (keys * 6 + 1) / kTileRows * kTileRows;
      rows = larger(kTileRows, smaller(kRows, fit));
    }
    int64_t keys, key_groups, words, padded_words, codes, channel_groups, value_words, rows;
  };

  struct Packed {
    Packed(const Attention& p, const Sizes& s, char* base) : scratch(base) {
      k = scratch.take<char>(s.key_groups * s.padded_words * kWordOfLanes);
      v = scratch.take<char>(s.channel_groups * s.value_words * kWordOfLanes);
      start = scratch.take<int32_t>(s.key_groups * kLanes);
      scale = scratch.take<float>(s.key_groups * kLanes);
      gain = scratch.take<int16_t>(p.each() * s.keys);
      top = scratch.take<float>(p.each());
    }
    Scratch scratch;
    char *k, *v;
    int32_t* start;
    float *scale, *top;
    int16_t* gain;
  };

  // Of a thread that packs.
  struct Packing {
    Packing(const Attention& p, const Sizes& s, char* base) : scratch(base) {
      floats = scratch.take<float>(larger(s.codes, kGroup * s.channel_groups * kLanes));
      codes = scratch.take<char>(kLanes * s.padded_words * 4);
      scales = scratch.take<float>(s.keys);
      mask = scratch.take<float>(s.keys);
      seen = scratch.take<int32_t>(s.keys);
      (void)p;
    }
    Scratch scratch;
    float* floats;
    char* codes;
    float *scales, *mask;
    int32_t* seen;
  };

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

  // A row of floats, its scale; NaN where it holds a NaN or inf. Zeros for a row of zeros.
  static float read_row(const Attention& p, const void* from, int64_t at, int64_t count,
                        int64_t padded, float* to) {
    to_floats(p.dtype, from, at, count, padded, to);
    const float amax = row_magnitude<Float32>(to, count);
    return amax <= FLT_MAX ? (amax == 0.0f ? 0.0f : scale_of(amax)) : NAN;
  }
  // What codes are multiplied by: codes are 0 where there is no scale.
  static float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }
  static vint codes_at(const float* row, float inverse) {
    const vint codes = codes_of(read<vfloat>(row), inverse);
    return inverse > 0.0f ? codes : vint{};  // and not of NaN or inf
  }

  // What is added to the scores of a row: −inf where a key is hidden, and only there.
  static void mask_row(const Attention& p, int64_t head, int64_t row, int64_t padded, float* to) {
    const Rows& mask = p.mask;
    const int64_t at = head / p.h * mask.batch + head % p.h * mask.head + row * mask.row;
    const int64_t count = p.mask_key == 0 ? 1 : p.n;
    const vfloat hidden = splat(-INFINITY);
    if (p.mask_is_bool) {
      const auto* seen = static_cast<const uint8_t*>(mask.values) + at;
      for (int64_t i = 0; i < count; ++i) to[i] = seen[i] != 0 ? 0.0f : -INFINITY;
    } else {
      to_floats(p.mask_dtype, mask.values, at, count, round_up(count, kLanes), to);
      for (int64_t i = 0; i < count; i += kLanes) {
        const vfloat value = read<vfloat>(to + i);
        const vfloat added =
            at_most(splat(FLT_MAX), at_least(splat(-FLT_MAX), value * (1.44269504f * 1024)));
        write(to + i, value == hidden ? hidden : added);
      }
    }
    for (int64_t i = 1; p.mask_key == 0 && i < padded; ++i) to[i] = to[0];
  }

  // Which keys some query of the head sees: all ones.
  static void find_seen(const Attention& p, const Sizes& s, int64_t head, Packing& work) {
    const int64_t all = p.mask.values != nullptr ? 0 : p.causal ? smaller(p.m, p.n) : p.n;
    for (int64_t i = 0; i < s.keys; ++i) work.seen[i] = i < all ? -1 : 0;
    if (p.mask.values == nullptr) return;
    bool some_hidden = true;
    // The last first, which sees all where a mask is causal.
    for (int64_t row = p.mask.row == 0 ? smaller(p.m, 1) : p.m; row > 0 && some_hidden; --row) {
      mask_row(p, head, row - 1, s.keys, work.mask);
      vint every = splat(-1);
      int64_t i = 0;
      for (; i + kLanes <= p.n; i += kLanes) {
        const vint now = read<vint>(work.seen + i) |
                         (vint)(read<vfloat>(work.mask + i) != splat(-INFINITY));
        write(work.seen + i, now);
        every &= now;
      }
      some_hidden = false;
      for (int lane = 0; lane < kLanes; ++lane) some_hidden |= every[lane] == 0;
      for (; i < p.n; ++i) {
        if (work.mask[i] != -INFINITY) work.seen[i] = -1;
        some_hidden |= work.seen[i] == 0;
      }
    }
  }

  static void pack(const Attention& p, int64_t head, char* memory, char* scratch) {
    const Sizes s(p);
    Packed to(p, s, memory);
    Packing work(p, s, scratch);
    pack_values(p, s, head, to, work);
    pack_keys(p, s, head, to, work);
    for (int64_t i = 0; i < p.each(); ++i) {
      const int64_t of = head / p.g * p.h + head % p.g * p.each() + i;
      // Of a mask that heads share, or of none.
      if (i > 0 && (p.mask.values == nullptr || p.mask.head == 0)) {
        std::memcpy(to.gain + i * s.keys, to.gain, s.keys * sizeof *to.gain);
        to.top[i] = to.top[0];
        continue;
      }
      find_seen(p, s, of, work);
      float top = 0.0f;
      for (int64_t key = 0; key < p.n; ++key) {
        const float scale = work.scales[key];
        if (work.seen[key] != 0 && scale > top) top = scale;  // a NaN is not
      }
      for (int64_t key = 0; key < s.keys; key += kLanes) {
        const vfloat scale = read<vfloat>(work.scales + key);
        const vint there = read<vint>(work.seen + key) & (vint)(scale > 0.0f);
        const vfloat part = nearest((there ? scale : vfloat{}) / (top > 0.0f ? top : 1.0f) *
                                    32767.0f);
        write_codes(to.gain + i * s.keys + key, __builtin_convertvector(part, vint));
      }
      to.top[i] = top;
    }
  }

  static int64_t at_of(const Attention& p, const Rows& rows, int64_t head) {
    return head / p.g * rows.batch + head % p.g * rows.head;
  }

  // The scales of the values are left in `work`.
  static void pack_values(const Attention& p, const Sizes& s, int64_t head, Packed& to,
                          Packing& work) {
    const int64_t at = at_of(p, p.v, head), padded = s.channel_groups * kLanes;
    constexpr int kBits = 32 / kGroup;
    constexpr int32_t kMask = kBits == 8 ? 255 : 65535;
    for (int64_t key = p.n; key < s.keys; ++key) work.scales[key] = 0.0f;
    for (int64_t word = 0; word < s.value_words; ++word) {
      float inverse[kGroup] = {};
      for (int64_t i = 0; i < kGroup && word * kGroup + i < p.n; ++i) {
        const int64_t key = word * kGroup + i;
        work.scales[key] =
            read_row(p, p.v.values, at + key * p.v.row, p.e, padded, work.floats + i * padded);
        inverse[i] = inverse_of(work.scales[key]);
      }
      for (int64_t first = 0; first < s.channel_groups; first += kGroups) {
        const int64_t groups = smaller(kGroups, s.channel_groups - first);
        char* panel = to.v + (first * s.value_words + word * groups) * kWordOfLanes;
        for (int64_t group = 0; group < groups; ++group) {
          vint words{};
          for (int64_t i = 0; i < kGroup; ++i) {
            if (inverse[i] == 0.0f) continue;
            const float* row = work.floats + i * padded + (first + group) * kLanes;
            words |= (codes_at(row, inverse[i]) & kMask) << static_cast<int>(i * kBits);
          }
          write(panel + group * kWordOfLanes, words);
        }
      }
    }
  }

  static void pack_keys(const Attention& p, const Sizes& s, int64_t head, Packed& to,
                        Packing& work) {
    using Key = std::conditional_t<kBytes, int8_t, int16_t>;
    const int64_t at = at_of(p, p.k, head), stride = s.padded_words * 4;
    for (int64_t first = 0; first < s.key_groups; first += kGroups) {
      const int64_t groups = smaller(kGroups, s.key_groups - first);
      for (int64_t group = 0; group < groups; ++group) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t key = (first + group) * kLanes + lane;
          char* codes = work.codes + lane * stride;
          float scale = 0.0f;
          if (key < p.n) scale = read_row(p, p.k.values, at + key * p.k.row, p.d, s.codes,
                                          work.floats);
          const float inverse = inverse_of(scale);
          vint sums{};
          for (int64_t i = 0; i < s.codes; i += kLanes) {
            const vint values = inverse > 0.0f ? codes_at(work.floats + i, inverse) : vint{};
            write_codes(reinterpret_cast<Key*>(codes) + i, values);
            sums += values;
          }
          int32_t sum = 0;
          for (int i = 0; i < kLanes; ++i) sum += sums[i];
          to.start[key] = kBytes ? -128 * sum : 0;
          // A zero row has a scale, as int8_quantize has it, but no code to multiply.
          to.scale[key] = work.scales[key] == work.scales[key] ? scale : NAN;
        }
        char* panel = to.k + first * s.padded_words * kWordOfLanes + group * kWordOfLanes;
        for (int64_t word = 0; word < s.padded_words; word += kLanes) {
          M::transpose(work.codes + word * 4, stride, panel + word * groups * kWordOfLanes,
                       groups * kWordOfLanes);
        }
      }
    }
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
        b.part[r] = most == kNanScore ? NAN : most == kHidden ? 0.0f
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
      for (int64_t i = 0; i < kPlanes; ++i)
        std::memset(to + i * plane, 0, keys * sizeof(Code));
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
          read_row(p, p.q.values, at + (row + r) * p.q.row, p.d, s.codes, b.floats);
      const float inverse = inverse_of(scale);
      for (int64_t i = 0; i < s.codes; i += kLanes) {
        const vint codes = inverse > 0.0f ? codes_at(b.floats + i, inverse) : vint{};
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
          mask_row(p, head, row + r, turned, added);
        }
      }
      for (int64_t key = groups * kLanes; key < turned; ++key) scores[key] = kHidden;
    }
    alignas(64) int32_t sums[kTileRows * kGroups * kLanes];
    const int64_t tiles = div_up(count, kTileRows);
    for (int64_t first = 0; first < groups; first += kGroups) {
      // Keys were packed so many groups at a time; the last ones may not be asked for.
      const int64_t together = smaller(kGroups, s.key_groups - first);
      const int64_t end = (first + together) * kLanes;
      const bool edge = end > (p.causal ? smaller(p.n, row + 1) : p.n);
      const char* panel = keys.k + first * s.padded_words * kWordOfLanes;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t r = count * tile / tiles, some = count * (tile + 1) / tiles - r;
        multiply<kGroups>(together, some, b.q + r * s.codes, s.codes, panel,
                          keys.start + first * kLanes, s.words, sums);
        const Tile t{&p, sums, keys.scale + first * kLanes, b.scale + r, b.most + r,
                     b.scores + r * s.keys + first * kLanes, s.keys, some, together,
                     first * kLanes, row + r};
        masked ? finish<true, true>(t) : edge ? finish<false, true>(t) : finish<false, false>(t);
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

  // From sums to scores.
  template <bool kMasked, bool kEdge>
  QNN_KERNEL static void finish(const Tile& given) {
    const Tile t = given;  // the stores below could alias it
    vint iota{};
    for (int lane = 0; lane < kLanes; ++lane) iota[lane] = lane;
    for (int64_t r = 0; r < t.rows; ++r) {
      const vfloat scale = splat(t.scale[r]);
      const vint end = splat(static_cast<int32_t>(
          (t.p->causal ? smaller(t.p->n, t.row + r + 1) : t.p->n) - t.key));
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
        const vfloat within = at_most(splat(kMost), at_least(splat(-kMost), value));
        vint score = __builtin_convertvector(nearest(within), vint);
        score = value != value ? splat(kNanScore) : score;
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

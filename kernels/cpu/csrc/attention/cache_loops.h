// The loops of a cache in int8, for all tiers: what appends to it, and queries that attend to it.
#pragma once

#include <cfloat>
#include <cmath>  // NAN

#include "attention/cache_codes.h"
#include "attention/mask.h"
#include "attention/weights.h"

namespace qnn {
namespace {

// The largest magnitude of a row of floats, NaN where one is not finite.
inline float finite_magnitude(const float* row, int64_t count) {
  const float amax = row_magnitude<Float32>(row, count);
  return amax <= FLT_MAX ? amax : NAN;
}

template <class M>
struct Cached : CacheCodes<M> {
  using C = CacheCodes<M>;
  using P = typename C::P;
  using C::kBytes;
  using C::kGroup;
  using C::kGroups;
  using C::kStep;
  using C::kTurn;
  using C::kWide;
  using C::kWordOfLanes;
  using typename C::Code;
  static constexpr int64_t kRows = kMostCacheRows, kPlanes = kBytes ? 2 : 1;
  // Sums of so many keys stay in 32 bits: 32640 · 127 · 512, and 255 · 127 · 65536.
  static constexpr int64_t kKeys = kBytes ? 65536 : 512;
  static constexpr int64_t kFewRows = 2;  // that multiply keys as they lie

  // -- appending

  static size_t append_bytes(const CacheAppend& p) {
    return round_up(larger(p.d, p.e), kLanes) * sizeof(float);
  }

  static void append(const CacheAppend& p, int64_t head, char* scratch) {
    const int64_t sequence = head / p.g, of = head % p.g;
    const int64_t first = p.length[sequence * p.length_stride];
    auto* floats = reinterpret_cast<float*>(scratch);
    for (int64_t i = 0; i < p.n; ++i) {
      const auto put = [&](const Rows& from, const CodeRows& to, int64_t columns) {
        const int64_t at = sequence * from.batch + of * from.head + i * from.row;
        to_floats(p.dtype, from.values, at, columns, round_up(columns, kLanes), floats);
        const int64_t place = first + i;
        return put_row(floats, columns,
                       to.codes + sequence * to.batch + of * to.head + place * to.row,
                       to.scales + sequence * to.scale_batch + of * to.scale_head + place);
      };
      const bool good = put(p.k, p.keys, p.d) & put(p.v, p.values, p.e);
      if (!good)
        p.keys.scales[sequence * p.keys.scale_batch + of * p.keys.scale_head + first + i] = NAN;
    }
  }

  // Whether all are finite. The scale is 0 where all codes are.
  static bool put_row(const float* row, int64_t count, int8_t* codes, float* scale) {
    const float amax = finite_magnitude(row, count);
    const bool good = amax == amax;
    *scale = good ? scale_of(amax) : 0.0f;
    const float inverse = good ? 1.0f / *scale : 0.0f;
    vint any{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const vint some = good ? codes_of(read<vfloat>(row + i), inverse) : vint{};
      any |= some;
      if (count - i >= kLanes) {
        write_codes(codes + i, some);
      } else {
        int8_t last[kLanes];
        write_codes(last, some);
        std::memcpy(codes + i, last, count - i);
      }
    }
    int32_t all = 0;
    for (int lane = 0; lane < kLanes; ++lane) all |= any[lane];
    if (all == 0) *scale = 0.0f;
    return good;
  }

  // -- the scales of the values, as parts of the largest that is seen

  struct Gains {
    Gains(const CachedAttention& p, char* base) : scratch(base) {
      top = scratch.template take<float>(1);
      parts = scratch.template take<int16_t>(round_up(p.call.n, kTurn));
    }
    Scratch scratch;
    float* top;
    int16_t* parts;
  };
  static size_t gain_bytes(const CachedAttention& p) { return Gains(p, nullptr).scratch.used(); }

  static const float* scales_of(const CodeRows& rows, int64_t sequence, int64_t head) {
    return rows.scales + sequence * rows.scale_batch + head * rows.scale_head;
  }

  // `head` is one of all that share keys where their gains are the same.
  static void gains_of(const CachedAttention& p, int64_t sequence, int64_t head, Gains& to,
                       float* added) {
    const Attention& call = p.call;
    const int64_t keys = p.tokens(sequence), padded = round_up(keys, kTurn);
    const float* scales = scales_of(p.values, sequence, head / call.each());
    const bool masked = call.mask.values != nullptr;
    // The largest of what masks add: −inf where no query sees a key.
    float* seen = masked ? added + padded : nullptr;
    if (masked) {
      const int64_t rows = call.mask.row == 0 ? 1 : call.m;
      bool hidden = true;
      // The last first, which sees all where a mask is causal.
      for (int64_t row = rows; row > 0 && hidden; --row) {
        read_mask(call, sequence, head, row - 1, keys, padded, added);
        vint every = splat(-1);
        for (int64_t i = 0; i < padded; i += kLanes) {
          const vfloat now = read<vfloat>(added + i);
          const vfloat all = row == rows ? now : read<vfloat>(seen + i);
          const vint there = (vint)(now != splat(-INFINITY)) | (vint)(all != splat(-INFINITY));
          write(seen + i, there ? vfloat{} : splat(-INFINITY));
          every &= there;
        }
        hidden = false;
        for (int lane = 0; lane < kLanes; ++lane) hidden |= every[lane] == 0;
      }
    }
    const auto at = [&](int64_t key) {
      const vfloat scale = load_some<Float32>(scales + key, keys - key);
      return masked ? (read<vfloat>(seen + key) == splat(-INFINITY) ? vfloat{} : scale) : scale;
    };
    vfloat most{};
    for (int64_t key = 0; key < keys; key += kLanes) {
      const vfloat scale = at(key);
      most = scale > most ? scale : most;
    }
    float top = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) top = most[lane] > top ? most[lane] : top;
    *to.top = top;
    const vfloat over = splat(top > 0.0f ? top : 1.0f);
    int64_t key = 0;
    for (; key < keys; key += kLanes)
      write_codes(to.parts + key, rounded(at(key) / over * splat(32767.0f)));
    for (; key < padded; key += kLanes) write_codes(to.parts + key, vint{});
  }

  static void gains(const CachedAttention& p, int64_t head, char* to, char* scratch) {
    const int64_t heads = p.gain_each() ? p.call.h : p.call.g;
    Gains place(p, to);
    Block b(p, scratch);
    gains_of(p, head / heads, head % heads * (p.call.h / heads), place, b.added);
  }

  // -- queries

  // Of a thread.
  struct Block {
    Block(const CachedAttention& p, char* base)
        : stride(round_up(p.call.n, kTurn)),
          codes(round_up(p.call.d, larger(kStep, kGroup * kLanes))),
          channels(round_up(p.call.e, kWide)),
          rows(CacheBlocks(p.call).rows),
          scratch(base),
          own(p, scratch.template take<char>(static_cast<int64_t>(gain_bytes(p)))) {
      added = scratch.template take<float>((p.call.mask.values != nullptr ? larger(rows, 2) : 0) *
                                           stride);
      floats = scratch.template take<float>(codes);
      q = scratch.template take<Code>(rows * codes);
      scores = scratch.template take<int32_t>(rows * stride);
      lags = scratch.template take<int16_t>(stride);
      weights = scratch.template take<Code>(kPlanes * rows * stride);
      staged = scratch.template take<char>(kLanes * codes / kGroup * 4);
      panel = scratch.template take<char>(
          larger(codes / kGroup * kGroups, kTurn / kGroup * kGroups) * kWordOfLanes);
      start = scratch.template take<int32_t>(kWide);
      sums = scratch.template take<int32_t>(kPlanes * rows * kWide);
      totals = scratch.template take<int32_t>(kPlanes * rows * channels);
      wholes = scratch.template take<double>(kPlanes * rows * channels);
      result = scratch.template take<float>(channels);
    }
    int64_t stride, codes, channels, rows;
    Scratch scratch;
    Gains own;
    float *added, *floats, *result;
    Code *q, *weights;
    int32_t *scores, *start, *sums, *totals;
    int16_t* lags;
    double* wholes;
    char *staged, *panel;
    float scale[kRows], part[kRows], factor[kRows];
    int32_t query_sums[kRows];
    alignas(64) vint most[kRows];
  };
  static size_t scratch_bytes(const CachedAttention& p) { return Block(p, nullptr).scratch.used(); }

  // Some rows: of one head, or a row of each of several.
  struct Share {
    const CachedAttention* p;
    int64_t sequence, head, row, count, keys, offset;  // of the first query, from the first key
    bool heads;
    int64_t head_of(int64_t r) const { return head + (heads ? r : 0); }
    int64_t row_of(int64_t r) const { return row + (heads ? 0 : r); }
    // The keys that a query may see.
    int64_t end(int64_t r) const {
      return p->call.causal ? smaller(keys, offset + row_of(r) + 1) : keys;
    }
    int64_t head_of_keys() const { return head / p->call.each(); }
  };

  static void rows(const CachedAttention& p, int64_t block, const char* gains, char* scratch) {
    const Attention& call = p.call;
    const CacheBlocks blocks(call);
    const int64_t which = block % blocks.blocks, head = block / blocks.blocks;
    Share t{};
    t.p = &p, t.heads = blocks.heads_at_once;
    const int64_t heads = t.heads ? call.g : call.h, all = t.heads ? call.each() : call.m;
    t.sequence = head / heads;
    t.head = t.heads ? head % heads * call.each() : head % heads;
    (t.heads ? t.head : t.row) += which * blocks.rows;
    t.count = smaller(blocks.rows, all - which * blocks.rows);
    t.keys = p.tokens(t.sequence), t.offset = t.keys - call.m;
    Block b(p, scratch);
    const int64_t limit = t.keys == 0 ? 0 : t.end(t.count - 1), turned = round_up(limit, kTurn);
    read_queries(t, turned, b);
    if (limit > 0) score(t, limit, b);
    for (int64_t r = 0; r < t.count; ++r) {
      if (gains == nullptr && (r == 0 || p.gain_each())) {
        // Beside the masks of the rows, which the scores have taken in.
        gains_of(p, t.sequence, t.head_of(r), b.own, b.added);
      }
      Gains given = b.own;
      if (gains != nullptr) {
        const int64_t of = p.gain_each() ? t.sequence * call.h + t.head_of(r)
                                         : t.sequence * call.g + t.head_of_keys();
        given = Gains(p, const_cast<char*>(gains) + of * gain_bytes(p));
      }
      b.factor[r] = *given.top * (32768.0f / 32767.0f);
      int32_t most = kHidden;
      for (int lane = 0; lane < kLanes; ++lane)
        most = limit > 0 && b.most[r][lane] > most ? b.most[r][lane] : most;
      if (most == kHidden || most == kNanScore) {
        for (int64_t i = 0; i < kPlanes; ++i)
          std::memset(b.weights + (r * kPlanes + i) * b.stride, 0, turned * sizeof(Code));
        b.part[r] = most == kNanScore ? NAN : 0.0f;
        continue;
      }
      const int64_t total = weigh_row(b.scores + r * b.stride, most, given.parts, turned, b.lags);
      split(b.lags, turned, b.weights + r * kPlanes * b.stride, b.stride);
      b.part[r] = 1.0f / static_cast<float>(total);
    }
    average(t, limit, b);
  }

  static void read_queries(const Share& t, int64_t turned, Block& b) {
    const Attention& call = t.p->call;
    const bool few = t.count <= kFewRows;
    for (int64_t r = 0; r < t.count; ++r) {
      const int64_t at =
          t.sequence * call.q.batch + t.head_of(r) * call.q.head + t.row_of(r) * call.q.row;
      to_floats(call.dtype, call.q.values, at, call.d, b.codes, b.floats);
      const float amax = finite_magnitude(b.floats, call.d);
      const bool good = amax == amax;
      const float scale = good ? scale_of(amax) : NAN, inverse = good ? 1.0f / scale : 0.0f;
      vint total{};
      for (int64_t i = 0; i < b.codes; i += kLanes) {
        const vint codes = good ? codes_of(read<vfloat>(b.floats + i), inverse) : vint{};
        total += codes;
        write_codes(b.q + r * b.codes + i, kBytes && !few ? codes + 128 : codes);
      }
      b.query_sums[r] = 0;
      for (int lane = 0; lane < kLanes; ++lane) b.query_sums[r] += total[lane];
      b.scale[r] = scale * call.unit;
      b.most[r] = splat(kHidden);
      if (call.mask.values != nullptr)
        read_mask(call, t.sequence, t.head_of(r), t.row_of(r), smaller(t.keys, turned), turned,
                  b.added + r * b.stride);
    }
  }

  // Scores of rows, and the largest of each.
  static void score(const Share& t, int64_t limit, Block& b) {
    const CachedAttention& p = *t.p;
    const Attention& call = p.call;
    const int8_t* keys = p.keys.codes + t.sequence * p.keys.batch + t.head_of_keys() * p.keys.head;
    const float* scales = scales_of(p.keys, t.sequence, t.head_of_keys());
    const bool masked = call.mask.values != nullptr;
    const bool calm = !masked && is_calm(t, scales, limit, b);
    const int64_t words = div_up(call.d, kGroup), turned = round_up(limit, kTurn);
    for (int64_t key = 0; key < turned; key += kWide) {
      if (key >= limit) {
        for (int64_t r = 0; r < t.count; ++r) {
          for (int64_t i = 0; i < kWide; i += kLanes)
            write(b.scores + r * b.stride + key + i, splat(kHidden));
        }
        continue;
      }
      // A place that no token has holds something, which is hidden.
      const int64_t there = smaller(kWide, call.n - key);
      const int8_t* from = keys + key * p.keys.row;
      if (t.count <= kFewRows) {
        C::dots(b.q, b.codes, b.query_sums, t.count, from, p.keys.row, there, call.d, b.sums);
      } else {
        C::key_panel(from, p.keys.row, there, call.d, b.staged, b.panel, b.start);
        const int64_t tiles = div_up(t.count, C::kTileRows);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t r = t.count * tile / tiles, some = t.count * (tile + 1) / tiles - r;
          P::template rows<kGroups>(some, b.q + r * b.codes, b.codes, b.panel, b.start, words,
                                    b.sums + r * kWide);
        }
      }
      const Tile of{&t, &b, scales, key};
      const bool edge = key + kWide > (call.causal ? t.end(0) : t.keys);
      if (calm) {
        edge ? finish<false, true, true>(of) : finish<false, false, true>(of);
      } else {
        masked ? finish<true, true, false>(of) : finish<false, true, false>(of);
      }
    }
  }

  // Whether no score is a NaN or beyond the limit.
  static bool is_calm(const Share& t, const float* scales, int64_t limit, const Block& b) {
    vfloat most{};
    vint good = splat(-1);
    for (int64_t key = 0; key < limit; key += kLanes) {
      const vfloat scale = load_some<Float32>(scales + key, limit - key);
      good &= scale == scale;
      most = scale > most ? scale : most;
    }
    float top = 0.0f;
    bool calm = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      top = most[lane] > top ? most[lane] : top;
      calm &= good[lane] != 0;
    }
    // Codes from elsewhere may be −128.
    const float bound = 127.0f * 128.0f * static_cast<float>(t.p->call.d) * top;
    for (int64_t r = 0; r < t.count; ++r) {
      const float scale = b.scale[r] < 0.0f ? -b.scale[r] : b.scale[r];
      calm &= bound * scale < static_cast<float>(kLimit / 2);
    }
    return calm;
  }

  struct Tile {
    const Share* t;
    Block* b;
    const float* scales;
    int64_t key;
  };

  // From sums to scores. Where all are calm they need no limit, and no look for NaN.
  template <bool kMasked, bool kEdge, bool kCalm>
  QNN_KERNEL static void finish(const Tile& tile) {
    const Share t = *tile.t;
    Block& b = *tile.b;
    const int64_t key = tile.key, stride = b.stride, rows = t.count;
    vint iota{};
    for (int lane = 0; lane < kLanes; ++lane) iota[lane] = lane;
    for (int64_t g = 0; g < kGroups; ++g) {
      const int64_t at = key + g * kLanes;
      // What lies after the tokens may be no memory of this cache.
      const vfloat scales = kEdge ? load_some<Float32>(tile.scales + at, larger(t.keys - at, 0))
                                  : read<vfloat>(tile.scales + at);
      for (int64_t r = 0; r < rows; ++r) {
        vfloat value =
            floats(read<vint>(b.sums + r * kWide + g * kLanes)) * scales * splat(b.scale[r]);
        vint hidden{};
        if constexpr (kMasked) {
          const vfloat added = read<vfloat>(b.added + r * stride + at);
          hidden = added == splat(-INFINITY);
          value = value + added;
        }
        if constexpr (kEdge) hidden |= iota >= splat(static_cast<int32_t>(t.end(r) - at));
        constexpr auto kMost = static_cast<float>(kLimit);
        vint score;
        if constexpr (kCalm) {
          score = rounded(value);
        } else {
          score = rounded(at_most(splat(kMost), at_least(splat(-kMost), value)));
          score = value != value ? splat(kNanScore) : score;
        }
        if constexpr (kMasked || kEdge) score = hidden ? splat(kHidden) : score;
        b.most[r] = score > b.most[r] ? score : b.most[r];
        write(b.scores + r * stride + at, score);
      }
    }
  }

  // A row of scores to weights, in 16 bits, in the memory of what each lies below the largest;
  // returns their sum before the gain.
  QNN_KERNEL static int64_t weigh_row(const int32_t* scores, int32_t most, const int16_t* gain,
                                      int64_t keys, int16_t* to) {
    using S = Shorts;
    const vint top = splat(most), last = splat(1 << 14);
    for (int64_t key = 0; key < keys; key += kLanes) {
      const vint below = top - read<vint>(scores + key);
      write_codes(to + key, below < last ? below : last);
    }
    // A lane's sums stay in 32 bits for so many keys.
    constexpr int64_t kSummed = int64_t{65536};
    const S::V c0 = S::splat(kOne), c1 = S::splat(-22571), c2 = S::splat(7537),
               c3 = S::splat(-1287);
    int64_t total = 0;
    for (int64_t begin = 0; begin < keys; begin += kSummed) {
      const int64_t end = smaller(keys, begin + kSummed);
      vint sums{};
      for (int64_t key = begin; key < end; key += S::kCount) {
        const S::V d = S::load(to + key), x = S::fraction(d);
        const S::V e =
            S::add(S::mulhrs(S::add(S::mulhrs(S::add(S::mulhrs(c3, x), c2), x), c1), x), c0);
        const S::V a = S::shifted(e, S::whole(d));
        sums = S::sum(sums, a);
        S::store(to + key, S::mulhrs(a, S::load(gain + key)));
      }
      for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
    }
    return total;
  }

  // Weights as the products take them: in two planes of bytes, `stride` apart, or as they are.
  QNN_KERNEL static void split(const int16_t* weights, int64_t keys, Code* to, int64_t stride) {
    if constexpr (kBytes) {
      for (int64_t i = 0; i < keys; ++i) to[i] = static_cast<uint8_t>(weights[i] >> 8);
      for (int64_t i = 0; i < keys; ++i) to[stride + i] = static_cast<uint8_t>(weights[i]);
    } else {
      std::memcpy(to, weights, keys * sizeof *to);
    }
  }

  // y = sums of weights times values.
  static void average(const Share& t, int64_t limit, Block& b) {
    const CachedAttention& p = *t.p;
    const Attention& call = p.call;
    const int8_t* values =
        p.values.codes + t.sequence * p.values.batch + t.head_of_keys() * p.values.head;
    const int64_t lines = kPlanes * t.count, tiles = div_up(lines, C::kTileRows);
    std::memset(b.totals, 0, lines * b.channels * sizeof *b.totals);
    const bool long_sums = limit > kKeys;
    if (long_sums) std::memset(b.wholes, 0, lines * b.channels * sizeof *b.wholes);
    const int32_t zeros[kWide] = {};
    for (int64_t key = 0; key < limit; key += kTurn) {
      const int64_t there = smaller(kTurn, call.n - key),
                    words = div_up(smaller(kTurn, limit - key), kGroup);
      for (int64_t first = 0; first < call.e; first += kWide) {
        C::value_panel(values + key * p.values.row + first, p.values.row, there, call.e - first,
                       b.panel);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t r = lines * tile / tiles, some = lines * (tile + 1) / tiles - r;
          P::template rows<kGroups>(some, b.weights + r * b.stride + key, b.stride, b.panel, zeros,
                                    words, b.sums);
          add(b.sums, some, b.totals + r * b.channels + first, b.channels);
        }
      }
      if (long_sums && ((key + kTurn) % kKeys == 0 || key + kTurn >= limit)) {
        add_sums(b.totals, lines * b.channels, true, b.wholes);
        std::memset(b.totals, 0, lines * b.channels * sizeof *b.totals);
      }
    }
    for (int64_t r = 0; r < t.count; ++r) {
      finish_row(b, r, long_sums);
      put(t, r, b.result);
    }
  }

  static void add(const int32_t* sums, int64_t rows, int32_t* to, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < kWide; i += kLanes)
        write(to + r * stride + i,
              read<vint>(to + r * stride + i) + read<vint>(sums + r * kWide + i));
    }
  }

  // Sums to float32, 256 · high + low in double, over the sum of the weights, in the values' unit.
  QNN_KERNEL static void finish_row(const Block& b, int64_t r, bool long_sums) {
    const vfloat part = splat(b.part[r]), factor = splat(b.factor[r]);
    const int64_t line = r * kPlanes * b.channels;
    for (int64_t i = 0; i < b.channels; i += kLanes) {
      alignas(64) float values[kLanes];
      for (int64_t half = 0; half < kLanes; half += kLanes / 2) {
        const auto sums = [&](int64_t plane) {
          const int64_t at = line + plane * b.channels + i + half;
          return long_sums ? read<vhalfdouble>(b.wholes + at)
                           : __builtin_convertvector(read<vhalfint>(b.totals + at), vhalfdouble);
        };
        vhalfdouble whole = sums(0);
        if constexpr (kPlanes == 2) whole = whole * (vhalfdouble{} + 256.0) + sums(1);
        write(values + half, __builtin_convertvector(whole, vhalffloat));
      }
      const vfloat scaled = read<vfloat>(values) * part * factor;
      write(values, scaled);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t at = i / kWide * kWide;
        b.result[at + C::channel_at(i - at + lane)] = values[lane];
      }
    }
  }

  static void put(const Share& t, int64_t r, const float* values) {
    const Attention& call = t.p->call;
    with_format(call.dtype, [&](auto format) {
      using Format = decltype(format);
      auto* to = static_cast<typename Format::Value*>(call.y) +
                 ((t.sequence * call.m + t.row_of(r)) * call.h + t.head_of(r)) * call.e;
      for (int64_t i = 0; i < call.e; i += kLanes)
        store_some<Format>(to + i, read<vfloat>(values + i), call.e - i);
    });
  }
};

template <class M>
constexpr CacheKernel cached() {
  using C = Cached<M>;
  return {C::append_bytes, C::append, C::gain_bytes, C::scratch_bytes, C::gains, C::rows};
}

}  // namespace
}  // namespace qnn

// Keys and values of a head of attention, packed: see attention/loops.h.
#pragma once

#include <cfloat>
#include <cmath>  // NAN

#include "attention/attention.h"
#include "attention/weights.h"
#include "recurrent/products.h"

namespace qnn {
namespace {

template <class M>
struct PackedHeads {
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
      most = scratch.take<float>(1);
    }
    Scratch scratch;
    char *k, *v;
    int32_t* start;
    float *scale, *top, *most;  // `most`: the largest scale, or NaN
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
        const vint now =
            read<vint>(work.seen + i) | (vint)(read<vfloat>(work.mask + i) != splat(-INFINITY));
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
        const vfloat part =
            (there ? scale : vfloat{}) / splat(top > 0.0f ? top : 1.0f) * splat(32767.0f);
        write_codes(to.gain + i * s.keys + key, rounded(part));
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
    float most = 0.0f;
    for (int64_t first = 0; first < s.key_groups; first += kGroups) {
      const int64_t groups = smaller(kGroups, s.key_groups - first);
      for (int64_t group = 0; group < groups; ++group) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t key = (first + group) * kLanes + lane;
          char* codes = work.codes + lane * stride;
          float scale = 0.0f;
          if (key < p.n)
            scale = read_row(p, p.k.values, at + key * p.k.row, p.d, s.codes, work.floats);
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
          to.scale[key] = work.scales[key] == work.scales[key] ? scale : NAN;
          if (most == most && !(to.scale[key] <= most)) most = to.scale[key];
        }
        char* panel = to.k + first * s.padded_words * kWordOfLanes + group * kWordOfLanes;
        for (int64_t word = 0; word < s.padded_words; word += kLanes) {
          M::transpose(work.codes + word * 4, stride, panel + word * groups * kWordOfLanes,
                       groups * kWordOfLanes);
        }
      }
    }
    *to.most = most;
  }
};

}  // namespace
}  // namespace qnn

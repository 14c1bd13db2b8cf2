// Keys and values of a head of attention, packed: see attention/loops.h.
#pragma once

#include "attention/attention.h"
#include "attention/mask.h"
#include "attention/products.h"
#include "attention/quantize.h"
#include "attention/weights.h"
#include "common/scratch.h"

namespace qnn {
namespace {

template <class P>
struct PackedHeads {
  using Code = typename P::Code;                                      // of weights
  using Quantized = std::conditional_t<P::kShifts, int8_t, int16_t>;  // of all else
  static constexpr bool kBytes = P::kShifts;
  static constexpr int64_t kGroup = P::kGroup, kGroups = kLanes == 16 ? 4 : 2,
                           kPlanes = kBytes ? 2 : 1;
  static constexpr int64_t kWordOfLanes = kLanes * 4;
  // Sums of so many keys stay in 32 bits: 32640 · 127 · 512, and 255 · 127 · 65536. The weights of
  // kFew keys stay in the first-level cache until they are multiplied.
  static constexpr int64_t kFew = 512, kKeys = kBytes ? 65536 : kFew;
  static constexpr int64_t kTurn = 64;  // keys are padded to it
  static_assert(kTurn % (2 * Shorts::kCount) == 0);

  struct Sizes {
    explicit Sizes(const Attention& p)
        : keys(round_up(p.n, kTurn)),
          key_groups(round_up(div_up(p.n, kLanes), Shorts::kVectors)),
          words(div_up(p.d, kGroup)),
          padded_words(round_up(words, kLanes)),
          codes(round_up(p.d, 4 * kLanes)),
          channel_groups(div_up(p.e, kLanes)),
          channels(round_up(p.e, 4 * kLanes)),
          value_words(keys / kGroup) {
      // An odd number of lines, so that rows do not meet in one set of the first-level cache.
      constexpr int64_t kOfLine = kLine / static_cast<int64_t>(sizeof(Shorts::Score));
      stride = (keys / kOfLine | 1) * kOfLine;
      // Few rows where there are many keys: scores stay in the second-level cache.
      constexpr int64_t kBytesOfRows = 1 << 18;
      const int64_t fit = kBytesOfRows / static_cast<int64_t>(keys * sizeof(Shorts::Score) + 1) /
                          P::kTileRows * P::kTileRows;
      rows = larger(P::kTileRows, smaller(P::kRows, fit));
    }
    int64_t keys, key_groups, words, padded_words, codes, channel_groups, channels, value_words;
    int64_t stride;  // of rows of scores
    int64_t rows;
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
      codes = scratch.take<Quantized>(larger(kLanes * s.codes, kTurn * s.channels));
      scales = scratch.take<float>(s.keys);
      mask = scratch.take<float>(p.mask.values != nullptr ? s.keys : 0);
      seen = scratch.take<int32_t>(s.keys);
    }
    Scratch scratch;
    Quantized* codes;
    float *scales, *mask;
    int32_t* seen;
  };

  // Up to kLanes rows from value `at` on.
  static void quantize(const Attention& p, const Rows& from, int64_t at, int64_t count,
                       int64_t columns, Quantized* to, int64_t stride, float* scales) {
    with_format(p.dtype, [&](auto format) {
      using Format = decltype(format);
      const auto* x = static_cast<const typename Format::Value*>(from.values) + at;
      quantize_rows<P, Format>(x, from.row, count, columns, to, stride, scales);
    });
  }

  // What is added to the scores of a row.
  static void mask_row(const Attention& p, int64_t head, int64_t row, int64_t padded, float* to) {
    read_mask(p, head / p.h, head % p.h, row, p.n, padded, to);
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
      vfloat tops{};
      for (int64_t key = 0; key < s.keys; key += kLanes) {
        const vfloat scale = read<vfloat>(work.scales + key);
        const vint there = read<vint>(work.seen + key) & (vint)(scale > tops);  // a NaN is not
        tops = there ? scale : tops;
      }
      float top = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) top = tops[lane] > top ? tops[lane] : top;
      for (int64_t key = 0; key < s.keys; key += Shorts::kCount) {
        vint gains[Shorts::kVectors];
        for (int64_t j = 0; j < Shorts::kVectors; ++j) {
          const vfloat scale = read<vfloat>(work.scales + key + j * kLanes);
          const vint there = read<vint>(work.seen + key + j * kLanes) & (vint)(scale > 0.0f);
          gains[j] = rounded((there ? scale : vfloat{}) / splat(top > 0.0f ? top : 1.0f) *
                             splat(32767.0f));
        }
        Shorts::store(to.gain + i * s.keys + key, Shorts::pack<P::kMixes>(gains));
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
    const int64_t at = at_of(p, p.v, head);
    for (int64_t key = 0; key < s.keys; key += kTurn) {
      for (int64_t i = 0; i < kTurn; i += kLanes) {
        const int64_t count = smaller(kLanes, larger(0, p.n - key - i));
        quantize(p, p.v, at + (key + i) * p.v.row, count, p.e, work.codes + i * s.channels,
                 s.channels, work.scales + key + i);
      }
      const int64_t word = key / kGroup;
      for (int64_t first = 0; first < s.channel_groups; first += kGroups) {
        const int64_t groups = smaller(kGroups, s.channel_groups - first);
        turn_values(work.codes + first * kLanes, s.channels, groups,
                    to.v + (first * s.value_words + word * groups) * kWordOfLanes);
      }
    }
  }

  // Codes of kTurn keys to words of as many keys as a word has, one group of channels after the
  // other.
  QNN_KERNEL static void turn_values(const Quantized* codes, int64_t stride, int64_t groups,
                                     char* to) {
    constexpr int kBits = 32 / kGroup;
    for (int64_t word = 0; word < kTurn / kGroup; ++word) {
      const Quantized* rows[kGroup];
      for (int64_t i = 0; i < kGroup; ++i)
        rows[i] = codes + Shorts::key_at<P::kMixes>(word * kGroup + i) * stride;
      for (int64_t group = 0; group < groups; ++group) {
        vuint words{};
        for (int64_t i = 0; i < kGroup; ++i) {
          words |= unsigned_codes(rows[i] + group * kLanes) << static_cast<uint32_t>(i * kBits);
        }
        write(to + (word * groups + group) * kWordOfLanes, words);
      }
    }
  }

  static void pack_keys(const Attention& p, const Sizes& s, int64_t head, Packed& to,
                        Packing& work) {
    const int64_t at = at_of(p, p.k, head), stride = s.codes * sizeof(Quantized);
    const auto* codes = reinterpret_cast<const char*>(work.codes);
    vfloat most{};
    vint bad{};
    for (int64_t first = 0; first < s.key_groups; first += kGroups) {
      const int64_t groups = smaller(kGroups, s.key_groups - first);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t key = (first + group) * kLanes;
        const int64_t count = smaller(kLanes, larger(0, p.n - key));
        quantize(p, p.k, at + key * p.k.row, count, p.d, work.codes, s.codes, to.scale + key);
        const vfloat scale = read<vfloat>(to.scale + key) + read<vfloat>(work.scales + key) * 0.0f;
        write(to.scale + key, scale);
        bad |= scale != scale;
        most = scale > most ? scale : most;
        char* panel = to.k + first * s.padded_words * kWordOfLanes + group * kWordOfLanes;
        vint sums{};
        for (int64_t word = 0; word < s.padded_words; word += kLanes) {
          char* words = panel + word * groups * kWordOfLanes;
          P::transpose(codes + word * 4, stride, words, groups * kWordOfLanes);
          if constexpr (kBytes && !P::kSigned) {
            for (int64_t i = 0; i < kLanes; ++i)
              sums = P::sum_of_codes(sums, read<vint>(words + i * groups * kWordOfLanes));
          }
        }
        write(to.start + key, sums * -128);
      }
    }
    float top = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (most[lane] > top) top = most[lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) top = bad[lane] != 0 ? NAN : top;
    *to.most = top;
  }
};

}  // namespace
}  // namespace qnn

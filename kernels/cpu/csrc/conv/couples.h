// Products of bytes where pairs of them are added in 16 bits, exactly. Two words of a panel are a
// couple where, whatever the codes, the sums of both fit in 16 bits: they are added there, and
// widened once. Any two may be one, so each is tried with the next, in some rounds. Other words go
// alone; and one whose own pairs are too much is two words, which add up to it. A tier gives,
// beside what a struct P of products.h has:
//
// clang-format off
//   add_couple(s, x, w)  s + the products of two words, x[2] and w[2]
//   load(w), both(a, b)  how much of the 16 bits of each lane a word takes; two loads together
//   fits(load)           whether that is no more than there is
//   halve(w)             makes each pair of w that is too much a half, and gives the other halves
// clang-format on
#pragma once

#include "conv/products.h"

namespace qnn {
namespace {

// Words of some vectors, a list of each, and where in the image what they are multiplied with lies.
struct ConvWords {
  int64_t most;
  int64_t* count;    // [vector]
  char* words;       // [vector][most][lane]
  int64_t* offsets;  // [vector][most], in bytes from a window's first pixel

  static ConvWords take(Scratch& scratch, int64_t vectors, int64_t most) {
    return {most, scratch.take<int64_t>(vectors), scratch.take<char>(vectors * most * kLanes * 4),
            scratch.take<int64_t>(vectors * most)};
  }
  ConvWords from(int64_t vector) const {
    return {most, count + vector, words + vector * most * kLanes * 4, offsets + vector * most};
  }
  vint operator[](int64_t at) const { return read<vint>(words + at * kLanes * 4); }
  void put(int64_t at, vint word, int64_t offset) const {
    write(words + at * kLanes * 4, word), offsets[at] = offset;
  }
};

// Of panels: the words of couples, one after the other, and those that go alone.
struct ConvCouples {
  ConvWords two, one;

  static ConvCouples take(Scratch& scratch, int64_t vectors, int64_t words) {
    constexpr int64_t kSlack = 2;  // what is written and does not count
    return {ConvWords::take(scratch, vectors, words + kSlack),
            ConvWords::take(scratch, vectors, 2 * words + kSlack)};
  }
  ConvCouples from(int64_t vector) const { return {two.from(vector), one.from(vector)}; }
};

// A round over the words of a vector that go alone, from `first` on.
template <class P>
void couple(const ConvCouples& to, int64_t first) {
  const ConvWords two = to.two, one = to.one;
  const int64_t all = *one.count;
  int64_t couples = *two.count, kept = first, i = first;
  for (; i + 2 <= all; i += 2) {
    const vint a = one[i], b = one[i + 1];
    const int64_t at_a = one.offsets[i], at_b = one.offsets[i + 1];
    // Both lists are written, and one counts: a branch would often be foretold wrong.
    two.put(couples, a, at_a), two.put(couples + 1, b, at_b);
    one.put(kept, a, at_a), one.put(kept + 1, b, at_b);
    const int64_t fits = P::fits(P::both(P::load(a), P::load(b)));
    couples += 2 * fits, kept += 2 - 2 * fits;
  }
  for (; i < all; ++i) one.put(kept++, one[i], one.offsets[i]);
  *two.count = couples, *one.count = kept;
}

// Of a panel, as turn_panel leaves it, for so many pixels: the more there are, the more rounds pay.
template <class P>
QNN_KERNEL void find_couples(const ConvRun* runs, int64_t run_count, int64_t vectors,
                             int64_t pixels, const char* panel, const ConvCouples& all) {
  const int rounds = pixels < 128 ? 1 : pixels < 512 ? 2 : 6;
  for (int64_t b = 0; b < vectors; ++b) {
    const ConvCouples to = all.from(b);
    const ConvWords one = to.one;
    const char* w = panel + b * kLanes * 4;
    int64_t count = 0;
    for (int64_t r = 0; r < run_count; ++r) {
      int64_t offset = runs[r].offset;
      for (int64_t i = 0; i < runs[r].words; ++i, w += vectors * kLanes * 4, offset += 4)
        one.put(count++, read<vint>(w), offset);
    }
    *to.two.count = 0, *one.count = count;
    for (int i = 0; i < rounds && *one.count > 0; ++i) couple<P>(to, i % 2);
    count = *one.count;  // after couples, whose words need no look of their own
    for (int64_t i = 0, until = count; i < until; ++i) {
      vint word = one[i];
      if (P::fits(P::load(word))) continue;
      one.put(count++, P::halve(word), one.offsets[i]);
      one.put(i, word, one.offsets[i]);
    }
    *one.count = count;
  }
}

constexpr int kCouplePixels = 8;

// R pixels × a vector; see ConvTile.
template <class P, int R>
QNN_KERNEL void couple_tile(const ConvTile& tile, const ConvCouples& couples) {
  vint sums[R];
  const char* x[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    x[r] = tile.image + tile.at[r];
    sums[r] = read<vint>(tile.start);
  }
  const ConvWords two = couples.two, one = couples.one;
  for (int64_t i = 0; i < *two.count; i += 2) {
    const int64_t first = two.offsets[i], second = two.offsets[i + 1];
    const vint w[2] = {two[i], two[i + 1]};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vint codes[2] = {splat(read<int32_t>(x[r] + first)),
                             splat(read<int32_t>(x[r] + second))};
      sums[r] = P::add_couple(sums[r], codes, w);
    }
  }
  for (int64_t i = 0; i < *one.count; ++i) {
    const int64_t at = one.offsets[i];
    const vint w = one[i];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      sums[r] = P::multiply_add(sums[r], splat(read<int32_t>(x[r] + at)), w);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) write(static_cast<int32_t*>(tile.acc) + r * tile.acc_stride, sums[r]);
}

template <class P, int R = kCouplePixels>
void couple_tile_of(int64_t count, const ConvTile& tile, const ConvCouples& couples) {
  if (count == R) return couple_tile<P, R>(tile, couples);
  if constexpr (R > 1) couple_tile_of<P, R - 1>(count, tile, couples);
}

// All pixels of a strip, spread evenly over tiles.
template <class P>
void couple_tiles(int64_t vectors, int64_t pixels, const ConvTile& strip,
                  const ConvCouples& couples) {
  const int64_t times = div_up(pixels, kCouplePixels);
  for (int64_t b = 0; b < vectors; ++b) {
    for (int64_t i = 0; i < times; ++i) {
      const int64_t first = pixels * i / times, count = pixels * (i + 1) / times - first;
      ConvTile tile = strip;
      tile.at += first;
      tile.start = static_cast<const int32_t*>(strip.start) + b * kLanes;
      tile.acc = static_cast<int32_t*>(strip.acc) + first * strip.acc_stride + b * kLanes;
      couple_tile_of<P>(count, tile, couples.from(b));
    }
  }
}

}  // namespace
}  // namespace qnn

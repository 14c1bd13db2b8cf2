// The loops around a tier's inner kernels: rows in, quantise, products, epilogue, rows out. A tier
// is a struct T:
//
// clang-format off
//   Code, Panel, Acc    element of a row of x, of a panel of w, and of their sums
//   Sum                 a vector of sums
//   kGroup              codes in a 32-bit word: what one lane multiplies in one instruction
//   kParts              of these codes a value of x is the sum, side by side in a group by 16 words
//   kQuantizes          x is quantised; else taken as float32, or in parts of bfloat16
//   kOffset             w is held in panels as w + kOffset
//   kWordStep           words that `block` takes at a time
//   kTileGroups         groups of kLanes rows of x in a tile, at most
//   kTileBytes          a tile's size, at most, where rows are long
//   kChunk              rows of w, so columns of y, between two epilogues: a multiple of 2 kLanes
//   kDepth              codes of K in a panel
//   kPanelRows          rows of w in a panel, where 1, 2, … groups are multiplied at once
//   kDotRows            up to so many rows of x take the dot form
//   kDotColumns         rows of w that `dot` takes
//   Row, row(p, n)      a row of w, for fill_panel and dot; bytes where x is quantised
//   Session             lives while a thread works on a call in blocked form
//   Turns               the struct, of many tiers of a file, whose `transpose` turns kLanes × kLanes
//                       words, rows so many bytes apart
//   fill_panel          a piece of one row of w into a panel
//   block<R, G>, dot<R> the inner kernels; inner.h has them for a tier that gives it four operations
// clang-format on
//
// Blocked form (many rows): a lane is a row of x. The words of kLanes rows lie side by side, and a
// word of w is sent to all lanes, so w is read where it lies, row by row, and needs no packing: the
// only copy of it is the module's. Sums come out with a column of y in each vector, and the
// epilogue turns them. Dot form (few rows): lanes run along K, w streams through once at memory
// speed, and each sum is reduced at its end.
#pragma once

#include "linear/blocked.h"
#include "linear/dots.h"
#include "linear/float_tier.h"
#include "linear/int16_tier.h"
#include "linear/int8_int4.h"

namespace qnn {
namespace {

// Few rows by tier Few, more rows by tier Many.
template <class Few, class Many>
size_t scratch_bytes(const Linear& p) {
  return p.m <= Few::kDotRows ? Dots<Few>::scratch_bytes(p) : Blocked<Many>::scratch_bytes(p);
}

template <class Few, class Many>
void run(const Linear& p, int part, int parts, char* scratch) {
  p.m <= Few::kDotRows ? Dots<Few>::run(p, part, parts, scratch)
                       : Blocked<Many>::run(p, part, parts, scratch);
}

template <class Few, class Many = Few>
constexpr Kernel kernel() {
  return {scratch_bytes<Few, Many>, run<Few, Many>};
}

}  // namespace
}  // namespace qnn

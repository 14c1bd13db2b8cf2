// The blocked form, of many rows: see loops.h.
#pragma once

#include "linear/inner.h"
#include "linear/output.h"
#include "linear/rows.h"

namespace qnn {
namespace {

// A tile of rows of x, in the layout [group][word][lane]; of several parts, each of which has the
// words of a row, [group][kLanes words][part][word of these][lane].
template <class T>
struct Tile {
  using Code = typename T::Code;
  int64_t groups, words, stride;  // words of a row; codes from a group to the next
  Code* codes;
  Code* rows;      // kLanes rows as they come, before they are turned
  float* scale;    // of a row
  int32_t* start;  // what the sums of a row start at: -kOffset times the sum of its codes

  static Tile take(Scratch& scratch, const Linear& p, int64_t groups) {
    Tile t;
    t.groups = groups;
    t.words = round_up(div_up(p.k, T::kGroup), kLanes);
    // One more line: groups a multiple of 4,096 bytes apart would share the sets of the cache.
    t.stride =
        t.words * T::kParts * T::kGroup * kLanes + kLine / static_cast<int64_t>(sizeof(Code));
    t.codes = scratch.take<Code>(groups * t.stride);
    t.rows = scratch.take<Code>(kLanes * row_stride(p));
    t.scale = scratch.take<float>(groups * kLanes);
    t.start = scratch.take<int32_t>(groups * kLanes);
    return t;
  }

  static int64_t row_stride(const Linear& p) {
    return round_up(div_up(p.k, T::kGroup), kLanes) * T::kGroup * T::kParts +
           kLine / static_cast<int64_t>(sizeof(Code));
  }

  void fill(const Linear& p, int64_t first_row) {
    const int64_t padded = words * T::kGroup, stride_in = row_stride(p);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t lane = g * kLanes + r, row = first_row + lane;
        if (row < p.m) {
          start[lane] =
              -T::kOffset * read_row<T>(p, row, padded, rows + r * stride_in, scale + lane);
        } else {
          std::memset(rows + r * stride_in, 0, padded * T::kParts * sizeof(Code));
          scale[lane] = 1.0f;
          start[lane] = 0;
        }
      }
      for (int64_t word = 0; word < words; word += kLanes) {
        for (int64_t part = 0; part < T::kParts; ++part) {
          T::transpose(rows + part * padded + word * T::kGroup,
                       stride_in * static_cast<int64_t>(sizeof(Code)),
                       codes + g * stride + (word * T::kParts + part * kLanes) * T::kGroup * kLanes,
                       kLanes * 4);
        }
      }
    }
  }
};

template <class T>
struct Blocked {
  using Acc = typename T::Acc;
  using Panel = typename T::Panel;
  // Columns that go to one thread together: whole vectors of 16-bit values of y.
  static constexpr int64_t kPiece = 2 * kLanes;

  // The groups of rows, spread evenly over tiles that stay in the second-level cache; and in a tile
  // as many groups at once as the registers hold, an even share again.
  struct Grid {
    int64_t tiles, groups, at_once, pieces;
    Grid(const Linear& p, int parts) {
      constexpr int64_t registers = std::extent_v<decltype(T::kPanelRows)>;
      const int64_t all = div_up(p.m, kLanes);
      const int64_t group_bytes =
          (p.k + 1) * T::kParts * static_cast<int64_t>(sizeof(typename T::Code)) * kLanes;
      int64_t most = T::kTileBytes / group_bytes;
      most = most < 1 ? 1 : most > T::kTileGroups ? T::kTileGroups : most;
      // A tile for each part, of no fewer groups than the registers hold: two parts that share a
      // tile both quantise it.
      const int64_t share = div_up(all, parts) < registers ? registers : div_up(all, parts);
      most = most < share ? most : share;
      groups = div_up(all, div_up(all, most));
      tiles = div_up(all, groups);
      at_once = div_up(groups, div_up(groups, registers));
      pieces = div_up(p.n, kPiece);
    }
  };

  struct Buffers {
    Tile<T> tile;
    Panel* panels;  // [column of the chunk][kPanelStride]
    Acc* acc;       // [groups at once][column of the chunk][row]
    Columns<T> columns;
    Buffers(Scratch scratch, const Linear& p, int64_t groups, size_t* used)
        : tile(Tile<T>::take(scratch, p, groups)),
          panels(scratch.take<Panel>(T::kChunk * kPanelStride<T>)),
          acc(scratch.take<Acc>(T::kChunk * tile.groups * kLanes)),
          columns(Columns<T>::take(scratch)) {
      if (used != nullptr) *used = scratch.used();
    }
  };

  static size_t scratch_bytes(const Linear& p) {
    size_t used = 0;
    Buffers(Scratch(nullptr), p, Grid(p, 1).groups, &used);
    return used;
  }

  static void run(const Linear& p, int part, int parts, char* scratch) {
    const Grid grid(p, parts);
    Buffers b(Scratch(scratch), p, grid.groups, nullptr);
    [[maybe_unused]] const typename T::Session session;
    const int64_t units = grid.tiles * grid.pieces, end = units * (part + 1) / parts;
    int64_t filled = -1;
    for (int64_t unit = units * part / parts; unit < end;) {
      const int64_t tile = unit / grid.pieces, row = tile * grid.groups * kLanes;
      const int64_t piece = unit % grid.pieces;
      if (tile != filled) b.tile.fill(p, row);
      filled = tile;
      // A chunk, or what is left of it in this tile or for this part.
      int64_t count = T::kChunk / kPiece;
      count = count < end - unit ? count : end - unit;
      count = count < grid.pieces - piece ? count : grid.pieces - piece;
      b.columns.move_to(p, piece * kPiece, count * kPiece);
      chunk(p, grid, b, row);
      unit += count;
    }
  }

  // The columns of a chunk times all rows of the tile, to y. The sums of the groups at once stay in
  // the first-level cache from the first product to the epilogue, where one panel holds all of K.
  static void chunk(const Linear& p, const Grid& grid, Buffers& b, int64_t row) {
    const int64_t panel_rows = T::kPanelRows[grid.at_once - 1],
                  columns = round_up(b.columns.count, panel_rows);
    for (int64_t k = 0; k == 0 || k < p.k; k += T::kDepth) {
      const int64_t depth = p.k - k < T::kDepth ? p.k - k : T::kDepth;
      const int64_t words = round_up(div_up(depth, T::kGroup), T::kWordStep);
      if (k == 0) std::memset(b.columns.start, 0, T::kChunk * 4);
      for (int64_t c = 0; c < columns; ++c) {
        Panel* to = panel_row(b.panels, c);
        if (c < b.columns.count) {
          fill_panel(to, p, b.columns.begin + c, k, depth);
          if constexpr (T::kQuantizes) {
            if (p.zero_point != 0) b.columns.start[c] -= p.zero_point * sum_of_panel(to, depth);
          }
        } else if constexpr (kInBfloat16<T>) {
          T::clear_panel(to, words);
        } else {
          std::memset(to, 0, words * T::kGroup * sizeof(Panel));
        }
      }
      // The panels after these: more of K, or the next chunk. Their rows of w are fetched while
      // these are multiplied.
      const bool more = k + T::kDepth < p.k;
      const int shift = p.weight.bits == 4;
      const int64_t stride = p.weight.row_bytes(p.k);
      const int8_t* next = p.w + (b.columns.begin + (more ? 0 : b.columns.count)) * stride +
                           (more ? (k + T::kDepth) >> shift : 0);
      for (int64_t g = 0; g < grid.groups; g += grid.at_once) {
        const int64_t groups = grid.groups - g < grid.at_once ? grid.groups - g : grid.at_once,
                      rows = groups * kLanes;
        Acc* acc = b.acc + g * kLanes * T::kChunk;
        if (k == 0) start(b.tile.start + g * kLanes, rows, acc);
        for (int64_t c = 0; c < columns; c += panel_rows) {
          multiply(grid.at_once, groups,
                   {b.tile.codes + g * b.tile.stride + k * T::kParts * kLanes, b.tile.stride, words,
                    b.panels + c * kPanelStride<T>, acc + c * rows, rows,
                    g == 0 ? next + c * stride : nullptr, stride, shift,
                    p.weight.scale == ScaleKind::float32 ? p.weight.group / T::kGroup : 0});
        }
        if (more) continue;
        finish(p, b, acc, g * kLanes, rows, row);
      }
    }
  }

  static Panel* panel_row(Panel* panels, int64_t c) {
    if constexpr (kInBfloat16<T>) {
      return T::panel_row(panels, c);
    } else {
      return panels + c * kPanelStride<T>;
    }
  }

  static void fill_panel(Panel* to, const Linear& p, int64_t n, int64_t k, int64_t depth) {
    if constexpr (T::kQuantizes) {
      T::fill_panel(to, p.w + n * p.k + k, depth);
    } else {
      T::fill_panel(to, T::row(p, n), k, depth);
    }
  }

  // Of the codes of w, while they are in the first-level cache.
  static int32_t sum_of_panel(const Panel* panel, int64_t depth) {
    int32_t sum = 0;
    for (int64_t i = 0; i < depth; ++i) sum += panel[i];
    return sum - static_cast<int32_t>(T::kOffset * depth);
  }

  static void start(const int32_t* from, int64_t rows, Acc* acc) {
    for (int64_t c = 0; c < T::kChunk; ++c) {
      for (int64_t r = 0; r < rows; r += kLanes) {
        write(acc + c * rows + r, __builtin_convertvector(read<vint>(from + r), typename T::Sum));
      }
    }
  }

  // The tier's block for so many groups of x, where panels are cut for `at_once`.
  template <int A = std::extent_v<decltype(T::kPanelRows)>>
  static void multiply(int64_t at_once, int64_t groups, const Product<T>& step) {
    if (at_once == A) return multiply_rows<T::kPanelRows[A - 1], A>(groups, step);
    if constexpr (A > 1) multiply<A - 1>(at_once, groups, step);
  }

  template <int R, int G>
  static void multiply_rows(int64_t groups, const Product<T>& step) {
    if (groups == G) return T::template block<R, G>(step);
    if constexpr (G > 1) multiply_rows<R, G - 1>(groups, step);
  }

  static void finish(const Linear& p, const Buffers& b, const Acc* acc, int64_t first, int64_t rows,
                     int64_t tile_row) {
    alignas(64) float values[T::kChunk * kLanes];
    const Columns<T>& columns = b.columns;
    const int64_t some = round_up(columns.count, kPiece);
    for (int64_t r = 0; r < rows && tile_row + first + r < p.m; r += kLanes) {
      const int64_t row = tile_row + first + r, left = p.m - row;
      const vfloat sx = read<vfloat>(b.tile.scale + first + r);
      for (int64_t c = 0; c < some; ++c) {
        auto sums = read<typename T::Sum>(acc + c * rows + r);
        if constexpr (T::kQuantizes && kZeroPoints<T>)
          sums = (vint)((vuint)sums + static_cast<uint32_t>(columns.start[c]));
        write(values + c * kLanes,
              scaled_sums<T>(sums, splat(columns.sw[c]), sx, splat(columns.bias[c])));
      }
      put_columns<typename T::Turns>(p, row, smaller(left, kLanes), columns.begin, columns.count,
                                     values);
    }
  }
};

}  // namespace
}  // namespace qnn

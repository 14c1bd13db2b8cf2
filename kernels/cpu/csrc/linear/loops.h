// The loops around a tier's inner kernels: rows in, quantise, products, epilogue, rows out. A tier
// is a struct T:
//
// clang-format off
//   Code, Panel, Acc    element of a row of x, of a panel of w, and of their sums (4 bytes)
//   Sum                 a vector of sums
//   kGroup              codes in a 32-bit word: what one lane multiplies in one instruction
//   kQuantizes          x is quantised; else taken as float32
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
//   transpose           kLanes × kLanes words, rows so many bytes apart
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

#include <limits>

#include "linear/decode.h"

namespace qnn {
namespace {

// A bump allocator; with no memory it only counts.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}
  template <class V>
  V* take(int64_t count) {
    char* here = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(V)), kLine);
    return reinterpret_cast<V*>(here);
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// -- rows of x
// ---------------------------------------------------------------------------------------------------------

// amax / 127, at least the smallest normal float; 1 for a zero row. NaN and inf pass through.
inline float scale_of(float amax) {
  if (amax == 0.0f) return 1.0f;
  const float scale = amax / 127.0f, least = std::numeric_limits<float>::min();
  return scale < least ? least : scale;
}

// Compared as integers, the magnitudes of NaN and inf are above every number's.
template <class Format>
inline float row_scale(const typename Format::Value* x, int64_t k) {
  float amax;
  if constexpr (sizeof(typename Format::Value) == 2) {
    vhalves most = {};
    for (int64_t i = 0; i < k; i += 2 * kLanes) {
      vhalves here = {};
      std::memcpy(&here, x + i, k - i < 2 * kLanes ? (k - i) * sizeof *x : sizeof here);
      here &= 0x7fff;
      most = here > most ? here : most;
    }
    uint16_t top[kLanes] = {};
    for (int lane = 0; lane < 2 * kLanes; ++lane)
      top[0] = most[lane] > top[0] ? most[lane] : top[0];
    amax = Format::load(top)[0];
  } else {
    vint most = {};
    for (int64_t i = 0; i < k; i += kLanes) {
      const vint here = bits(load_some<Format>(x + i, k - i)) & 0x7fffffff;
      most = here > most ? here : most;
    }
    int32_t top = 0;
    for (int lane = 0; lane < kLanes; ++lane) top = most[lane] > top ? most[lane] : top;
    std::memcpy(&amax, &top, sizeof amax);
  }
  return scale_of(amax);
}

// The low bytes, or halves, of kLanes words.
template <class Code>
inline void write_codes(Code* p, vint q) {
  if constexpr (sizeof(Code) == 1) {
#if defined(__AVX512F__) && QNN_LANES == 16
    write(p, _mm512_cvtepi32_epi8((__m512i)q));
#else
    write(p, __builtin_convertvector(q, vbyte));
#endif
  } else {
    write(p, __builtin_convertvector(q, vshort));
  }
}

// round(x · inverse) of kLanes values. A product rounds to at most 127. Adding 1.5 · 2^23 rounds it
// to nearest, ties to even, and leaves it in the low bits.
inline vint codes_of(vfloat x, float inverse) {
  const vfloat round = splat(0x1.8p23f);
  return bits(x * inverse + round) - bits(round);
}

// One row: its codes, padded with zeros to `padded`, and its scale. Returns the sum of the codes.
template <class Format, class Code>
inline int32_t quantize_row(const typename Format::Value* x, int64_t k, int64_t padded, Code* codes,
                            float* scale) {
  *scale = row_scale<Format>(x, k);
  const float inverse = 1.0f / *scale;
  vint sum = {};
  int64_t i = 0;
  // Else the row holds NaN or inf, and its codes are 0.
  if (*scale <= std::numeric_limits<float>::max()) {
    if constexpr (std::is_same_v<Format, BFloat16> && sizeof(Code) == 1) {
      // Two values to a word are two floats by a shift and a mask, and two codes again.
      for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
        const vuint pair = read<vuint>(x + i);
        const vint low = codes_of((vfloat)(pair << 16), inverse);
        const vint high = codes_of((vfloat)(pair & 0xffff0000), inverse);
        sum += low + high;
        write(codes + i, __builtin_convertvector(((vuint)low & 0xff) | (vuint)high << 8, vhalf));
      }
    }
    for (; i < k; i += kLanes) {
      const vint q = codes_of(load_some<Format>(x + i, k - i), inverse);
      sum += q;
      write_codes(codes + i, q);
    }
  }
  for (; i < padded; i += kLanes) write_codes(codes + i, vint{});
  int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

// One row on the call's own grid; as above.
template <class Format, class Code>
inline int32_t quantize_on_grid(const Linear& p, const typename Format::Value* x, int64_t padded,
                                Code* codes, float* scale) {
  const float inverse = 1.0f / p.grid_scale;
  const vfloat low = splat(static_cast<float>(-128 - p.zero_point)),
               high = splat(static_cast<float>(127 - p.zero_point)), round = splat(0x1.8p23f);
  vint lanes, most = {};
  vuint sum = {};  // codes of NaN may wrap around
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  int64_t i = 0;
  for (; i < p.k; i += kLanes) {
    const vfloat value = load_some<Format>(x + i, p.k - i);
    const vint magnitude = bits(value) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
    vfloat v = value * inverse;
    v = v < low ? low : v;
    v = v > high ? high : v;
    vint q = bits(v + round) - bits(round) + p.zero_point;
    if (p.k - i < kLanes) q = lanes < static_cast<int32_t>(p.k - i) ? q : vint{};
    sum += (vuint)q;
    write_codes(codes + i, q);
  }
  for (; i < padded; i += kLanes) write_codes(codes + i, vint{});
  bool good = p.grid_scale == p.grid_scale;
  for (int lane = 0; lane < kLanes; ++lane) good = good && most[lane] < 0x7f800000;
  *scale = good ? p.grid_scale : std::numeric_limits<float>::quiet_NaN();
  if (!good) return 0;  // whatever the codes are
  int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += static_cast<int32_t>(sum[lane]);
  return total;
}

inline void quantize(const Quantize& p, int part, int parts) {
  with_format(p.x_dtype, [&](auto format) {
    using Format = decltype(format);
    for (int64_t row = p.m * part / parts; row < p.m * (part + 1) / parts; ++row) {
      const auto* x = static_cast<const typename Format::Value*>(p.x) + row * p.k;
      int8_t* codes = p.codes + row * p.k;
      const int64_t whole = p.k / kLanes * kLanes, rest = p.k - whole;
      p.scales[row] = row_scale<Format>(x, p.k);
      if (!(p.scales[row] <= std::numeric_limits<float>::max())) {
        std::memset(codes, 0, p.k);
        continue;
      }
      const float inverse = 1.0f / p.scales[row];
      for (int64_t i = 0; i < whole; i += kLanes)
        write_codes(codes + i, codes_of(Format::load(x + i), inverse));
      if (rest > 0) {
        int8_t last[kLanes];
        write_codes(last, codes_of(load_some<Format>(x + whole, rest), inverse));
        std::memcpy(codes + whole, last, rest);
      }
    }
  });
}

// One row of x as a tier wants it, `padded` codes long; returns the sum of its codes.
template <class T>
inline int32_t read_row(const Linear& p, int64_t row, int64_t padded, typename T::Code* out,
                        float* scale) {
  if constexpr (std::is_same_v<typename T::Code, float>) {
    with_format(p.x_dtype, [&](auto format) {
      using Format = decltype(format);
      const auto* x = static_cast<const typename Format::Value*>(p.x) + row * p.k;
      for (int64_t i = 0; i < padded; i += kLanes)
        write(out + i, i < p.k ? load_some<Format>(x + i, p.k - i) : vfloat{});
    });
    return 0;
  } else if (p.row_scale != nullptr) {
    const int8_t* codes = static_cast<const int8_t*>(p.x) + row * p.k;
    *scale = p.row_scale[row];
    // Loops of one purpose each: those the compiler makes vectors of.
    for (int64_t i = 0; i < p.k; ++i) out[i] = codes[i];
    for (int64_t i = p.k; i < padded; ++i) out[i] = 0;
    int32_t sum = 0;
    if constexpr (T::kOffset != 0) {
      for (int64_t i = 0; i < p.k; ++i) sum += codes[i];
    }
    return sum;
  } else {
    int32_t sum = 0;
    with_format(p.x_dtype, [&](auto format) {
      using Format = decltype(format);
      const auto* x = static_cast<const typename Format::Value*>(p.x) + row * p.k;
      sum = p.fixed ? quantize_on_grid<Format>(p, x, padded, out, scale)
                    : quantize_row<Format>(x, p.k, padded, out, scale);
    });
    return sum;
  }
}

// -- epilogue
// ----------------------------------------------------------------------------------------------------------

// The columns of y in one chunk, and what is added and multiplied there, as float32.
template <class T>
struct Columns {
  int64_t begin, count;
  float* sw;
  float* bias;
  int32_t* start;  // of the blocked form: -zero_point times the sum of a row of w

  static Columns take(Scratch& scratch) {
    return {0, 0, scratch.take<float>(T::kChunk), scratch.take<float>(T::kChunk),
            scratch.take<int32_t>(T::kChunk)};
  }

  void move_to(const Linear& p, int64_t first, int64_t most) {
    begin = first;
    count = p.n - first < most ? p.n - first : most;
    if (p.weight == Weight::e2m1) {
      for (int64_t i = 0; i < T::kChunk; i += kLanes) write(sw + i, splat(*p.sw));
    } else {
      fill<Float32>(sw, p.sw + first);
    }
    if (p.bias == nullptr) return;
    with_format(p.bias_dtype, [&](auto format) {
      using Format = decltype(format);
      fill<Format>(bias, static_cast<const typename Format::Value*>(p.bias) + first);
    });
  }

 private:
  template <class Format>
  void fill(float* to, const typename Format::Value* from) const {
    for (int64_t i = 0; i < T::kChunk; i += kLanes) {
      write(to + i, i < count ? load_some<Format>(from + i, count - i) : vfloat{});
    }
  }
};

inline vfloat sum_as_float(vint acc) { return floats(acc); }
inline vfloat sum_as_float(vfloat acc) { return acc; }

// The way from sums to y: scales, bias, cast; then the activation and the residual, each on what
// the cast left, with a cast of its own. So one call gives what separate operations give.
// Everything is held by value: through a reference the compiler would have to read it again after
// each store to y.
template <class T, class Format>
struct Output {
  using Value = typename Format::Value;
  using Sum = typename T::Sum;
  // What values are turned as: float64 is made of float32 at the very end.
  using Turned = std::conditional_t<std::is_same_v<Format, Float64>, Float32, Format>;
  static constexpr int kPerWord = 4 / sizeof(typename Turned::Value), kTurned = kLanes * kPerWord;
  static constexpr bool kDouble = std::is_same_v<Format, Float64>;

  const float* sw;
  const float* bias;     // or null
  const int32_t* start;  // or null
  Value* y;              // of the chunk's first column, in row 0
  const Value* residual;
  int64_t stride, count;
  Activation activation;

  Output(const Linear& p, const Columns<T>& columns)
      : sw(columns.sw),
        bias(p.bias == nullptr ? nullptr : columns.bias),
        start(p.zero_point == 0 ? nullptr : columns.start),
        y(static_cast<Value*>(p.y) + columns.begin),
        residual(p.residual == nullptr ? nullptr
                                       : static_cast<const Value*>(p.residual) + columns.begin),
        stride(p.n),
        count(columns.count),
        activation(p.activation) {}

  // Dot form: the sums of one row, at the kLanes columns from `c` of the chunk on.
  void row(int64_t row, int64_t c, Sum sums, float sx) const {
    alignas(64) float value[kLanes];
    vfloat scaled = sum_as_float(sums) * read<vfloat>(sw + c);
    if constexpr (T::kQuantizes) scaled = scaled * sx;
    if (bias != nullptr) scaled = scaled + read<vfloat>(bias + c);
    write(value, scaled);
    if (!kDouble && activation != Activation::none) activate_all<Turned>(activation, value, 1);
    put(row * stride + c, read<vfloat>(value), count - c);
  }

  // Blocked form: a vector of sums is a column of up to kLanes rows. kTurned columns from `c` of
  // the chunk on are scaled as they lie, cast, packed into words, and turned on their way to y.
  void columns(int64_t row, int64_t rows, int64_t c, const typename T::Acc* acc, int64_t acc_stride,
               vfloat sx) const {
    alignas(64) float values[kTurned * kLanes];
    alignas(64) int32_t words[kLanes * kLanes], turned[kLanes * kLanes];
    const auto scaled = [&](int64_t i) {
      Sum sum = read<Sum>(acc + i * acc_stride);
      if constexpr (T::kQuantizes) {
        if (start != nullptr) sum = (vint)((vuint)sum + static_cast<uint32_t>(start[c + i]));
      }
      vfloat value = sum_as_float(sum) * sw[c + i];
      if constexpr (T::kQuantizes) value = value * sx;
      return bias == nullptr ? value : value + bias[c + i];
    };
    const auto pack = [&](const auto& value) {
      for (int w = 0; w < kLanes; ++w)
        write(words + w * kLanes,
              Turned::pack(value(w * kPerWord), value(w * kPerWord + kPerWord - 1)));
    };
    if (kDouble || activation == Activation::none) {
      pack(scaled);
    } else {
      for (int i = 0; i < kTurned; ++i) write(values + i * kLanes, scaled(i));
      activate_all<Turned>(activation, values, kTurned);
      pack([&](int64_t i) { return read<vfloat>(values + i * kLanes); });
    }
    const int64_t at = row * stride + c, left = count - c;
    constexpr int64_t kWordRow = kLanes * 4;
    if (!kDouble && residual == nullptr && rows == kLanes && left >= kTurned) {
      return T::transpose(words, kWordRow, y + at, stride * static_cast<int64_t>(sizeof(Value)));
    }
    T::transpose(words, kWordRow, turned, kWordRow);
    for (int64_t r = 0; r < rows; ++r) {
      const auto* values_of_row =
          reinterpret_cast<const typename Turned::Value*>(turned + r * kLanes);
      for (int i = 0; i < kTurned && i < left; i += kLanes)
        put(at + r * stride + i, Turned::load(values_of_row + i), left - i);
    }
  }

 private:
  // The last steps at `left` or kLanes elements of y from `at` on.
  void put(int64_t at, vfloat value, int64_t left) const {
    if constexpr (kDouble) {
      for (int64_t lane = 0; lane < kLanes && lane < left; ++lane) {
        const double exact = activate(activation, static_cast<double>(value[lane]));
        y[at + lane] = residual == nullptr ? exact : exact + residual[at + lane];
      }
    } else {
      if (residual != nullptr)
        value = Format::round(value) + load_some<Format>(residual + at, left);
      store_some<Format>(y + at, value, left);
    }
  }
};

// -- blocked form
// ------------------------------------------------------------------------------------------------------

// A tile of rows of x, in the layout [group][word][lane].
template <class T>
struct Tile {
  using Code = typename T::Code;
  int64_t groups, words, stride;  // words of a row; codes from a group to the next
  Code* codes;
  Code* rows;  // kLanes rows as they come, before they are turned
  float* scale;
  int32_t* start;  // what the sums of a row start at: -kOffset times the sum of its codes

  static Tile take(Scratch& scratch, const Linear& p, int64_t groups) {
    Tile t;
    t.groups = groups;
    t.words = round_up(div_up(p.k, T::kGroup), kLanes);
    // One more line: groups a multiple of 4,096 bytes apart would share the sets of the cache.
    t.stride = t.words * T::kGroup * kLanes + kLine / static_cast<int64_t>(sizeof(Code));
    t.codes = scratch.take<Code>(groups * t.stride);
    t.rows = scratch.take<Code>(kLanes * row_stride(p));
    t.scale = scratch.take<float>(groups * kLanes);
    t.start = scratch.take<int32_t>(groups * kLanes);
    return t;
  }

  static int64_t row_stride(const Linear& p) {
    return round_up(div_up(p.k, T::kGroup), kLanes) * T::kGroup +
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
          std::memset(rows + r * stride_in, 0, padded * sizeof(Code));
          scale[lane] = 1.0f;
          start[lane] = 0;
        }
      }
      for (int64_t word = 0; word < words; word += kLanes) {
        T::transpose(rows + word * T::kGroup, stride_in * static_cast<int64_t>(sizeof(Code)),
                     codes + g * stride + word * T::kGroup * kLanes, kLanes * 4);
      }
    }
  }
};

// A tier whose registers need no setting up.
struct NoSession {
  NoSession() {}
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
          (p.k + 1) * static_cast<int64_t>(sizeof(typename T::Code)) * kLanes;
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
      with_format(p.y_dtype, [&](auto format) { chunk<decltype(format)>(p, grid, b, row); });
      unit += count;
    }
  }

  // The columns of a chunk times all rows of the tile, to y. The sums of the groups at once stay in
  // the first-level cache from the first product to the epilogue, where one panel holds all of K.
  template <class Format>
  static void chunk(const Linear& p, const Grid& grid, Buffers& b, int64_t row) {
    const int64_t panel_rows = T::kPanelRows[grid.at_once - 1],
                  columns = round_up(b.columns.count, panel_rows);
    for (int64_t k = 0; k == 0 || k < p.k; k += T::kDepth) {
      const int64_t depth = p.k - k < T::kDepth ? p.k - k : T::kDepth;
      const int64_t words = round_up(div_up(depth, T::kGroup), T::kWordStep);
      if (k == 0 && p.zero_point != 0) std::memset(b.columns.start, 0, T::kChunk * 4);
      for (int64_t c = 0; c < columns; ++c) {
        Panel* to = b.panels + c * kPanelStride<T>;
        if (c < b.columns.count) {
          fill_panel(to, p, b.columns.begin + c, k, depth);
          if constexpr (T::kQuantizes) {
            if (p.zero_point != 0) b.columns.start[c] -= p.zero_point * sum_of_panel(to, depth);
          }
        } else {
          std::memset(to, 0, words * T::kGroup * sizeof(Panel));
        }
      }
      // The panels after these: more of K, or the next chunk. Their rows of w are fetched while
      // these are multiplied.
      const bool more = k + T::kDepth < p.k;
      const int shift = p.weight == Weight::e2m1;
      const int8_t* next = p.w + (b.columns.begin + (more ? 0 : b.columns.count)) * p.w_stride +
                           (more ? (k + T::kDepth) >> shift : 0);
      for (int64_t g = 0; g < grid.groups; g += grid.at_once) {
        const int64_t groups = grid.groups - g < grid.at_once ? grid.groups - g : grid.at_once,
                      rows = groups * kLanes;
        Acc* acc = b.acc + g * kLanes * T::kChunk;
        if (k == 0) start(b.tile.start + g * kLanes, rows, acc);
        for (int64_t c = 0; c < columns; c += panel_rows) {
          multiply(grid.at_once, groups,
                   {b.tile.codes + g * b.tile.stride + k * kLanes, b.tile.stride, words,
                    b.panels + c * kPanelStride<T>, acc + c * rows, rows,
                    g == 0 ? next + c * p.w_stride : nullptr, p.w_stride, shift});
        }
        if (!more) finish<Format>(p, b, acc, g * kLanes, rows, row);
      }
    }
  }

  static void fill_panel(Panel* to, const Linear& p, int64_t n, int64_t k, int64_t depth) {
    if constexpr (T::kQuantizes) {
      T::fill_panel(to, p.w + n * p.w_stride + k, depth);
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

  template <class Format>
  static void finish(const Linear& p, const Buffers& b, const Acc* acc, int64_t first, int64_t rows,
                     int64_t tile_row) {
    using Out = Output<T, Format>;
    const Out output(p, b.columns);
    for (int64_t r = 0; r < rows && tile_row + first + r < p.m; r += kLanes) {
      const int64_t row = tile_row + first + r, left = p.m - row;
      const vfloat sx = read<vfloat>(b.tile.scale + first + r);
      for (int64_t c = 0; c < output.count; c += Out::kTurned) {
        output.columns(row, left < kLanes ? left : kLanes, c, acc + c * rows + r, rows, sx);
      }
    }
  }
};

// -- dot form
// ----------------------------------------------------------------------------------------------------------

template <class T>
struct Dots {
  using Code = typename T::Code;
  static constexpr int64_t kCodeStep = kLine / static_cast<int64_t>(sizeof(Code));

  // Those of x and, where zero has a code, a row of ones, whose products are the sums of the rows
  // of w: w is read once, and memory is what the time goes to.
  static int64_t rows_of(const Linear& p) { return p.m + (T::kQuantizes && p.zero_point != 0); }

  struct Buffers {
    int64_t stride;  // codes from a row to the next
    Code* codes;
    float* scale;
    int32_t* start;
    typename T::Acc* acc;  // [row][column of the chunk]
    Columns<T> columns;
    Buffers(Scratch scratch, const Linear& p, size_t* used)
        : stride(round_up(p.k, kLine) + kCodeStep),
          codes(scratch.take<Code>(rows_of(p) * stride)),
          scale(scratch.take<float>(rows_of(p))),
          start(scratch.take<int32_t>(rows_of(p))),
          acc(scratch.take<typename T::Acc>(rows_of(p) * T::kChunk)),
          columns(Columns<T>::take(scratch)) {
      if (used != nullptr) *used = scratch.used();
    }
  };

  static size_t scratch_bytes(const Linear& p) {
    size_t used = 0;
    Buffers(Scratch(nullptr), p, &used);
    return used;
  }

  static void run(const Linear& p, int part, int parts, char* scratch) {
    Buffers b(Scratch(scratch), p, nullptr);
    // Whole cache lines of y to each part.
    const int64_t pieces = div_up(p.n, kLanes);
    const int64_t begin = pieces * part / parts * kLanes,
                  all = pieces * (part + 1) / parts * kLanes;
    const int64_t end = all < p.n ? all : p.n;
    if (begin >= end) return;
    for (int64_t row = 0; row < p.m; ++row) {
      b.start[row] = -T::kOffset * read_row<T>(p, row, round_up(p.k, kLine),
                                               b.codes + row * b.stride, b.scale + row);
      if constexpr (!T::kQuantizes)
        T::arrange(p.weight, b.codes + row * b.stride, round_up(p.k, kLine));
    }
    if (rows_of(p) > p.m) {
      Code* ones = b.codes + p.m * b.stride;
      for (int64_t i = 0; i < round_up(p.k, kLine); ++i) ones[i] = i < p.k;
      b.start[p.m] = static_cast<int32_t>(-T::kOffset * p.k);
    }
    for (int64_t n = begin; n < end; n += T::kChunk) {
      b.columns.move_to(p, n, end - n < T::kChunk ? end - n : T::kChunk);
      multiply(p, b);
      with_format(p.y_dtype, [&](auto format) { write_rows<decltype(format)>(p, b); });
    }
  }

  static auto row_of(const Linear& p, int64_t n) {
    if constexpr (T::kQuantizes) {
      return p.w + n * p.w_stride;
    } else {
      return T::row(p, n);
    }
  }

  static void multiply(const Linear& p, Buffers& b) {
    for (int64_t c = 0; c < b.columns.count; c += T::kDotColumns) {
      // Behind the last row of w its last row again: the same memory, and sums that nobody reads.
      decltype(row_of(p, 0)) w[T::kDotColumns];
      for (int64_t i = 0; i < T::kDotColumns; ++i) {
        const int64_t column = c + i < b.columns.count ? c + i : b.columns.count - 1;
        w[i] = row_of(p, b.columns.begin + column);
      }
      int64_t row = 0;
      const auto rest = [&](auto rows) {
        for (; row + rows() <= rows_of(p); row += rows()) {
          T::template dot<rows()>(b.codes + row * b.stride, b.stride, w, p.k,
                                  b.acc + row * T::kChunk + c);
        }
      };
      rest(std::integral_constant<int, 4>{});
      rest(std::integral_constant<int, 2>{});
      rest(std::integral_constant<int, 1>{});
    }
  }

  template <class Format>
  static void write_rows(const Linear& p, const Buffers& b) {
    const Output<T, Format> output(p, b.columns);
    for (int64_t row = 0; row < p.m; ++row) {
      for (int64_t c = 0; c < output.count; c += kLanes) {
        auto sums = read<typename T::Sum>(b.acc + row * T::kChunk + c);
        // Of long rows the two terms may wrap, their sum does not.
        if constexpr (T::kOffset != 0)
          sums = (vint)((vuint)sums + static_cast<uint32_t>(b.start[row]));
        if constexpr (T::kQuantizes) {
          if (p.zero_point != 0) {
            vuint columns = read<vuint>(b.acc + p.m * T::kChunk + c);
            if constexpr (T::kOffset != 0) columns += static_cast<uint32_t>(b.start[p.m]);
            sums = (vint)((vuint)sums - columns * static_cast<uint32_t>(p.zero_point));
          }
        }
        output.row(row, c, sums, b.scale[row]);
      }
    }
  }
};

// -- the two forms together
// --------------------------------------------------------------------------------------------

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

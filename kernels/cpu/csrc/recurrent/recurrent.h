// The recurrent layers of kernels/recurrent.py. A tier gives the products, a struct P:
//
// clang-format off
//   Code, Acc           what activations are multiplied as, and the sums
//   kQuantizes          activations are integers; else float32
//   kShifts, kLeast     as bytes: code - low of their part + kLeast; else as they are
//   kGroup              codes that one 32-bit word of activations or of weights stands for
//   kWordStep           words that a product takes at a time
//   kTileRows           rows that `multiply` takes at most
//   Session             lives while a thread works on a call
//   transpose           kLanes × kLanes words, rows so many bytes apart
//   widen               codes of a row of w to kLanes words, as a panel has them
//   sum_of_codes        onto the sums of a panel's lanes, where kShifts
//   multiply<G>         rows × G · kLanes columns
// clang-format on
//
// A lane is a unit. Weights are laid into panels once a call, [block of units][word][gate][lane],
// and a word of a row's activations is sent to all lanes, so that the sums of a unit's gates stand
// in the same lane and what follows needs no tensor of all gates. Blocks are divided among the
// parts, which keep their panels in their caches, and wait for each other between the steps.
#pragma once

#include <sched.h>

#include <algorithm>

#include "common/rows.h"
#include "common/scratch.h"
#include "recurrent/recurrent_call.h"

namespace qnn {
namespace {

// -- parts that wait for each other
// ----------------------------------------------------------------------------------------

inline void meet(const Members& m) {
  const int mine = m.end - m.begin;
  if (mine == m.parts) return;
  Meeting& at = *m.meeting;
  const unsigned round = __atomic_load_n(&at.round, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&at.arrived, mine, __ATOMIC_ACQ_REL) == m.parts) {
    __atomic_store_n(&at.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&at.round, round + 1, __ATOMIC_RELEASE);
    return;
  }
  // Some 10 µs; then another process may want the core that the last part waits for.
  constexpr int kSpins = 500;
  for (int spin = 0; __atomic_load_n(&at.round, __ATOMIC_ACQUIRE) == round; ++spin) {
    if (spin > kSpins) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  }
}

// A run of blocks, or of rows, of all that there are.
struct Run {
  int64_t begin, end;
};

// What of `all` each part does, where a unit of work is `group` of them, the last perhaps fewer.
struct Shares {
  int64_t all, group;
  int parts;
  Run of(int part) const {
    const int64_t groups = div_up(all, group);
    const auto at = [&](int64_t i) { return std::min(groups * i / parts * group, all); };
    return {at(part), at(part + 1)};
  }
};

// -- arithmetic of the cells
// -----------------------------------------------------------------------------------------------

// The grid of a part: a row of the table.
struct Grid {
  float scale = 0, inverse = 0, low = 0, high = 0;
  static Grid of(const float* table, int64_t part) {
    if (table == nullptr || table[4 * part] == 0) return {};
    const float* row = table + 4 * part;
    return {row[0], 1.0f / row[0], row[2] - row[1], row[3] - row[1]};
  }
};

inline vfloat codes_on(const Grid& grid, vfloat v) {
  return nearest(at_most(splat(grid.high), at_least(splat(grid.low), v * grid.inverse)));
}

inline vfloat round_to(const Grid& grid, vfloat v) {
  return grid.scale == 0 ? v : codes_on(grid, v) * grid.scale;
}

inline vfloat cell_tanh(vfloat x) {
  const vfloat c = at_most(splat(8.0f), at_least(splat(-8.0f), x)), z = c * c;
  vfloat p = z * -1.1565058922756906e-13f + 6.365833618762423e-11f;
  p = p * z + -2.2315303070513437e-08f;
  p = p * z + 1.1642605386441574e-05f;
  p = p * z + 0.0031493804417550564f;
  p = p * z + 0.13124364614486694f;
  p = p * z + 1.0f;
  vfloat q = z * 0.00026129968464374542f + 0.02467506378889084f;
  q = q * z + 0.46457695960998535f;
  q = q * z + 1.0f;
  return c * p / q;
}

inline vfloat cell_sigmoid(vfloat x) { return cell_tanh(x * 0.5f) * 0.5f + 0.5f; }

inline vfloat first_lanes(vfloat v, int64_t count) {
  if (count >= kLanes) return v;
  for (int64_t lane = count < 0 ? 0 : count; lane < kLanes; ++lane) v[lane] = 0;
  return v;
}

// These two are not for inlining: a switch over formats, each time, is most of a file.
QNN_KERNEL vfloat load_floats(DType dtype, const void* p, int64_t at, int64_t count) {
  vfloat v = {};
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    v = load_some<Format>(static_cast<const typename Format::Value*>(p) + at, count);
  });
  return v;
}

// Casts to `dtype`, and writes; returns what was written.
QNN_KERNEL vfloat store_floats(DType dtype, void* p, int64_t at, vfloat v, int64_t count) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    if constexpr (!std::is_same_v<Format, Float64>) v = Format::round(v);
    store_some<Format>(static_cast<typename Format::Value*>(p) + at, v, count);
  });
  return v;
}

// -- codes of activations
// --------------------------------------------------------------------------------------------------

// How what enters a product is quantised.
struct Quantizer {
  Grid grid;    // where fixed
  int32_t low;  // what is taken from a code
};

// One row of x as P wants it, `padded` codes long, and its scale.
template <class P>
QNN_KERNEL void read_row(const Recurrent& p, const Quantizer& how, int64_t row, int64_t padded,
                         typename P::Code* codes, float* scale) {
  const int64_t k = p.inputs;
  with_format(p.dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::Value*>(p.x) + row * k;
    if constexpr (!P::kQuantizes) {
      for (int64_t i = 0; i < padded; i += kLanes)
        write(codes + i, i < k ? load_some<Format>(x + i, k - i) : vfloat{});
    } else if (p.scheme == Scheme::dynamic) {
      *scale = row_scale<Format>(x, k);
      const bool finite = *scale <= std::numeric_limits<float>::max();
      const float inverse = finite ? 1.0f / *scale : 0.0f;
      for (int64_t i = 0; i < k; i += kLanes) {
        const vint q = finite ? codes_of(load_some<Format>(x + i, k - i), inverse) : vint{};
        write_codes(codes + i, q - how.low);
      }
    } else {
      typename Format::Value odd = 0;  // NaN where x is not finite
      vfloat odds = {};
      for (int64_t i = 0; i < k; i += kLanes) {
        const vfloat v = load_some<Format>(x + i, k - i);
        const vint q = __builtin_convertvector(codes_on(how.grid, v), vint);
        write_codes(codes + i, q - how.low);
        if constexpr (std::is_same_v<Format, Float64>) {  // may be finite where v is not
          for (int64_t j = i; j < k && j < i + kLanes; ++j) odd += x[j] * 0;
        } else {
          odds += v * 0.0f;
        }
      }
      float sum = static_cast<float>(odd);
      for (int lane = 0; lane < kLanes; ++lane) sum += odds[lane];
      *scale = how.grid.scale + sum;
    }
  });
}

// -- products
// --------------------------------------------------------------------------------------------------------------

// Of integers, by a machine's multiply_add(sum, x, w): R rows a call times G gates.
template <class M, int kMost4, int kMost3>
struct IntegerProduct : M {
  using Code = std::conditional_t<M::kGroup == 4, uint8_t, int16_t>;
  using Acc = int32_t;
  static constexpr bool kQuantizes = true, kShifts = M::kGroup == 4;
  static constexpr int32_t kLeast = M::kOffset != 0 ? 0 : -128;  // of an unsigned or a signed byte
  static constexpr int64_t kGroup = M::kGroup, kWordStep = 1, kTileRows = 18;
  template <int G>
  static constexpr int kMost = G == 4 ? kMost4 : kMost3;

  static void widen(const int8_t* w, int64_t count, char* to) {
    using Panel = std::conditional_t<kShifts, int8_t, int16_t>;
    constexpr int64_t kAll = kGroup * kLanes;
    Panel codes[kAll] = {};
    if (count >= kAll) {
      for (int64_t i = 0; i < kAll; ++i) codes[i] = w[i];
    } else {
      for (int64_t i = 0; i < count; ++i) codes[i] = w[i];
    }
    std::memcpy(to, codes, sizeof codes);
  }
  static vint sum_of_codes(vint sum, vint words) {
    return M::multiply_add(sum, splat(0x01010101), words);
  }

  template <int R, int G>
  QNN_KERNEL static void product(const Code* x, int64_t stride, const char* panel,
                                 const int32_t* start, int64_t words, Acc* acc) {
    vint sums[R][G];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[r][g] = read<vint>(start + g * kLanes);
    }
    for (int64_t word = 0; word < words; ++word) {
      vint w[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = read<vint>(panel + (word * G + g) * kLanes * 4);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vint codes = splat(read<int32_t>(x + r * stride + word * kGroup));
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sums[r][g] = M::multiply_add(sums[r][g], codes, w[g]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) write(acc + (r * G + g) * kLanes, sums[r][g]);
    }
  }

  template <int G, int R = kMost<G>>
  static void rows(int64_t count, const Code* x, int64_t stride, const char* panel,
                   const int32_t* start, int64_t words, Acc* acc) {
    if (count == R) return product<R, G>(x, stride, panel, start, words, acc);
    if constexpr (R > 1) rows<G, R - 1>(count, x, stride, panel, start, words, acc);
  }

  // acc [rows][G][kLanes] = start + x · panel.
  template <int G>
  QNN_KERNEL static void multiply(const Code* x, int64_t stride, int64_t count, const char* panel,
                                  const int32_t* start, int64_t words, Acc* acc) {
    const int64_t times = div_up(count, kMost<G>);
    for (int64_t i = 0; i < times; ++i) {
      const int64_t row = count * i / times, some = count * (i + 1) / times - row;
      rows<G>(some, x + row * stride, stride, panel, start, words, acc + row * G * kLanes);
    }
  }
};

// Of float32 by int8, four codes a word, each made a float on its way.
template <class M, int kMost4, int kMost3>
struct FloatProduct : M {
  using Code = float;
  using Acc = float;
  static constexpr bool kQuantizes = false, kShifts = false;
  static constexpr int32_t kLeast = 0;
  static constexpr int64_t kGroup = 4, kWordStep = 1, kTileRows = 18;
  template <int G>
  static constexpr int kMost = G == 4 ? kMost4 : kMost3;

  static void widen(const int8_t* w, int64_t count, char* to) {
    int8_t codes[kGroup * kLanes] = {};
    std::memcpy(codes, w, count < kGroup * kLanes ? count : kGroup * kLanes);
    std::memcpy(to, codes, sizeof codes);
  }
  static vint sum_of_codes(vint sum, vint) { return sum; }

  // Sums of 256 products, added up: the error of one long sum would be several times as large.
  template <int R, int G>
  QNN_KERNEL static void product(const float* x, int64_t stride, const char* panel, int64_t words,
                                 float* acc) {
    constexpr int64_t kWords = 64;
    for (int64_t begin = 0; begin == 0 || begin < words; begin += kWords) {
      vfloat sums[R][G];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sums[r][g] = vfloat{};
      }
      const int64_t end = words - begin < kWords ? words : begin + kWords;
      for (int64_t word = begin; word < end; ++word) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          vfloat w[G];
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            w[g] = floats((read<vint>(panel + (word * G + g) * kLanes * 4) << (24 - 8 * j)) >> 24);
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const vfloat value = splat(x[r * stride + word * 4 + j]);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) sums[r][g] = fma(value, w[g], sums[r][g]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          float* to = acc + (r * G + g) * kLanes;
          write(to, begin == 0 ? sums[r][g] : read<vfloat>(to) + sums[r][g]);
        }
      }
    }
  }

  template <int G, int R = kMost<G>>
  static void rows(int64_t count, const float* x, int64_t stride, const char* panel, int64_t words,
                   float* acc) {
    if (count == R) return product<R, G>(x, stride, panel, words, acc);
    if constexpr (R > 1) rows<G, R - 1>(count, x, stride, panel, words, acc);
  }

  template <int G>
  QNN_KERNEL static void multiply(const float* x, int64_t stride, int64_t count, const char* panel,
                                  const int32_t*, int64_t words, float* acc) {
    const int64_t times = div_up(count, kMost<G>);
    for (int64_t i = 0; i < times; ++i) {
      const int64_t row = count * i / times, some = count * (i + 1) / times - row;
      rows<G>(some, x + row * stride, stride, panel, words, acc + row * G * kLanes);
    }
  }
};

// -- a weight
// --------------------------------------------------------------------------------------------------------------

template <class P, int G>
struct Matrix {
  static constexpr int64_t kWidth = G * kLanes;  // columns in a block

  // A block, and behind it its panel.
  struct Block {
    int32_t start[kWidth];  // what sums start at: low times the sum of a column's codes
    float sw[kWidth], bias[kWidth];
    const char* panel() const { return reinterpret_cast<const char*>(this + 1); }
  };

  const int8_t* w;
  const float* sw;
  const void* bias;
  DType bias_dtype;
  // Row `g · gate + block · step + lane` of w, up to row `g · gate + rows`, is lane `lane` of gate
  // g.
  int64_t depth, rows, gate, step, blocks;
  int32_t low;
  Grid grids[G];

  // Of G gates, a block of units each; or, without gates, G times as many columns.
  static Matrix of_gates(const int8_t* w, const float* sw, const void* bias, DType bias_dtype,
                         int64_t units, int64_t depth) {
    return {w, sw, bias, bias_dtype, depth, units, units, kLanes, div_up(units, kLanes), 0, {}};
  }
  static Matrix plain(const int8_t* w, const float* sw, int64_t columns, int64_t depth) {
    return {w, sw, nullptr, DType::float32, depth, columns, kLanes, kWidth, div_up(columns, kWidth),
            0, {}};
  }

  int64_t words() const { return round_up(div_up(depth, P::kGroup), P::kWordStep); }
  int64_t block_bytes() const {
    return static_cast<int64_t>(sizeof(Block)) + round_up(words(), kLanes) * kWidth * 4;
  }
  int64_t code_stride() const {
    const int64_t most = round_up(depth, kLanes), padded = words() * P::kGroup;
    constexpr int64_t size = sizeof(typename P::Code);
    // One more line: rows a multiple of 4,096 bytes apart would share the sets of the cache.
    return (round_up((most < padded ? padded : most) * size, kLine) + kLine) / size;
  }

  QNN_KERNEL void pack(int64_t index, Block* to) const {
    char* panel = reinterpret_cast<char*>(to + 1);
    for (int g = 0; g < G; ++g) {
      // Columns without gates end where all end.
      const int64_t first = g * gate + index * step;
      const int64_t left = gate == kLanes && step == kWidth ? rows - first : rows - index * step;
      const int64_t count = left < 0 ? 0 : left < kLanes ? left : kLanes, at = g * kLanes;
      write(to->sw + at, count > 0 ? load_some<Float32>(sw + first, count) : vfloat{});
      vfloat b = {};
      if (bias != nullptr && count > 0) b = load_floats(bias_dtype, bias, first, count);
      write(to->bias + at, b);
      vint sum = {};
      // The rows of the next gate, or of the next block, are fetched from memory meanwhile: alone
      // a CPU does not see so many short streams coming.
      const int64_t after = g + 1 < G ? first + gate : (index + 1) * step;
      const bool more = after + kLanes <= (gate == rows ? G : 1) * rows;
      const int8_t* next = w + after * depth;
      for (int64_t word = 0; word * P::kGroup < round_up(depth, P::kGroup * kLanes);
           word += kLanes) {
        const int64_t k = word * P::kGroup, some = depth - k;
        char* here = panel + (word * G + g) * kLanes * 4;
        const bool whole = P::kGroup == 4 && count == kLanes && some >= P::kGroup * kLanes;
        if (more) {
          const int8_t* line = next + k * kLanes;
          for (int i = 0; i < P::kGroup * kLanes * kLanes && line + i < next + depth * kLanes;
               i += kLine)
            __builtin_prefetch(line + i);
        }
        if (whole) {
          P::transpose(w + first * depth + k, depth, here, kWidth * 4);
        } else {
          alignas(64) char square[kLanes * kLanes * 4] = {};
          for (int64_t lane = 0; lane < count; ++lane)
            P::widen(w + (first + lane) * depth + k, some, square + lane * kLanes * 4);
          P::transpose(square, kLanes * 4, here, kWidth * 4);
        }
        if constexpr (P::kShifts) {
          for (int i = 0; i < kLanes; ++i)
            sum = P::sum_of_codes(sum, read<vint>(here + i * kWidth * 4));
        }
      }
      write(to->start + at, (vint)((vuint)sum * static_cast<uint32_t>(low)));
    }
  }
};

// Sums to values of a linear, each rounded to its gate's part.
template <class P, int G>
QNN_KERNEL void scale_sums(const typename P::Acc* acc, int64_t rows,
                           const typename Matrix<P, G>::Block& block, bool biased,
                           const Grid* grids, const float* scales, float* to) {
  for (int g = 0; g < G; ++g) {
    const vfloat sw = read<vfloat>(block.sw + g * kLanes),
                 bias = read<vfloat>(block.bias + g * kLanes);
    const Grid grid = grids[g];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (r * G + g) * kLanes;
      using Sum = std::conditional_t<P::kQuantizes, vint, vfloat>;
      vfloat v = sum_as_float(read<Sum>(acc + at)) * sw;
      if constexpr (P::kQuantizes) v = v * scales[r];
      if (biased) v = v + bias;
      write(to + at, round_to(grid, v));
    }
  }
}

// What one product takes: the codes of all rows, their scales as each part has them, and what the
// parts tell each other about their share of a row: its peak, or whether it is finite.
template <class P>
struct Operand {
  typename P::Code* codes;
  int64_t stride;
  int32_t* marks;  // [part][row]
  float* scales;   // [part][row]
  int64_t mark_stride;
};

inline int32_t greatest(vint v) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t most = v[0];
  for (int lane = 1; lane < kLanes; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
#endif
}

// States of all parts to codes that all parts read, and the scales of their rows.
template <class P>
QNN_KERNEL void publish(const Recurrent& p, const Members& members, const Operand<P>& to,
                        const Quantizer& how, const float* values, const Shares& shares) {
  const int64_t marks = to.mark_stride;
  const auto each = [&](const auto& work) {
    for (int part = members.begin; part < members.end; ++part) work(part, shares.of(part));
  };
  const auto of = [&](int64_t block, int64_t row) {
    return read<vfloat>(values + (block * p.batch + row) * kLanes);
  };
  if constexpr (!P::kQuantizes) {
    each([&](int, const Run& run) {
      for (int64_t row = 0; row < p.batch; ++row) {
        for (int64_t i = run.begin; i < run.end; ++i)
          write(to.codes + row * to.stride + i * kLanes, of(i, row));
      }
    });
    meet(members);
  } else if (p.scheme == Scheme::dynamic) {
    each([&](int part, const Run& run) {
      for (int64_t row = 0; row < p.batch; ++row) {
        vint most = {};
        for (int64_t i = run.begin; i < run.end; ++i) {
          const vint here = bits(of(i, row)) & 0x7fffffff;
          most = here > most ? here : most;
        }
        to.marks[part * marks + row] = greatest(most);
      }
    });
    meet(members);
    each([&](int part, const Run& run) {
      for (int64_t row = 0; row < p.batch; ++row) {
        int32_t most = 0;
        for (int other = 0; other < members.parts; ++other)
          most = std::max(most, to.marks[other * marks + row]);
        float amax;
        std::memcpy(&amax, &most, sizeof amax);
        const float scale = scale_of(amax);
        to.scales[part * marks + row] = scale;
        const bool finite = scale <= std::numeric_limits<float>::max();
        const float inverse = finite ? 1.0f / scale : 0.0f;
        for (int64_t i = run.begin; i < run.end; ++i) {
          const vint q = finite ? codes_of(of(i, row), inverse) : vint{};
          write_codes(to.codes + row * to.stride + i * kLanes, q - how.low);
        }
      }
    });
    meet(members);
  } else {
    each([&](int part, const Run& run) {
      for (int64_t row = 0; row < p.batch; ++row) {
        vfloat odds = {};
        for (int64_t i = run.begin; i < run.end; ++i) {
          const vfloat v = of(i, row);
          odds += v * 0.0f;
          const vint q = __builtin_convertvector(codes_on(how.grid, v), vint);
          write_codes(to.codes + row * to.stride + i * kLanes, q - how.low);
        }
        to.marks[part * marks + row] = greatest(bits(odds) & 0x7fffffff);
      }
    });
    meet(members);
    each([&](int part, const Run&) {
      for (int64_t row = 0; row < p.batch; ++row) {
        int32_t odd = 0;
        for (int other = 0; other < members.parts; ++other) odd |= to.marks[other * marks + row];
        to.scales[part * marks + row] =
            odd == 0 ? how.grid.scale : std::numeric_limits<float>::quiet_NaN();
      }
    });
  }
}

// -- the layer
// -------------------------------------------------------------------------------------------------------------

// `states` and what is like them lie as [block of kLanes][row][lane], in float32.
template <class P, int G>
class Layer {
  using Code = typename P::Code;
  using Weight = Matrix<P, G>;
  using Block = typename Weight::Block;
  static constexpr bool kLstm = G == 4;
  static constexpr int64_t kWidth = Weight::kWidth;
  // Of the input linears of a part's units: what stays in the second-level cache beside its panels.
  static constexpr int64_t kChunkBytes = 1 << 18;

  const Recurrent& p_;
  const Members& members_;
  const bool projected_;
  const int64_t units_, outs_;  // blocks of kLanes
  Weight input_, hidden_, projection_;
  Quantizer of_x_, of_h_, of_inner_;
  Grid of_cell_, of_gates_[G], of_tanh_;
  int64_t chunk_;  // steps

  size_t bytes_;
  Code* x_codes_;
  float* x_scales_;
  Operand<P> h_codes_[2], inner_codes_;
  float *h_, *c_, *inner_ = nullptr;
  // Of each part.
  char *input_blocks_, *hidden_blocks_, *projection_blocks_ = nullptr, *spare_;
  float* chunk_values_;
  int64_t chunk_size_, spare_size_;
  Shares units_of_, outs_of_, projections_of_;

 public:
  Layer(const Recurrent& p, const Members& members, char* scratch)
      : p_(p),
        members_(members),
        projected_(p.w_hr != nullptr),
        units_(div_up(p.hidden, kLanes)),
        outs_(div_up(p.outputs, kLanes)),
        input_(Weight::of_gates(p.w_ih, p.sw_ih, p.b_ih, p.b_ih_dtype, p.hidden, p.inputs)),
        hidden_(Weight::of_gates(p.w_hh, p.sw_hh, p.b_hh, p.b_hh_dtype, p.hidden, p.outputs)),
        projection_(Weight::plain(p.w_hr, p.sw_hr, p.outputs, p.hidden)),
        units_of_{units_, 1, members.parts},
        outs_of_{outs_, projected_ ? G : 1, members.parts},
        projections_of_{projection_.blocks, 1, members.parts} {
    constexpr int64_t kStates = kLstm ? 2 : 1, kInput = 1 + kStates, kHidden = kInput + G,
                      kActivation = kHidden + G, kOthers = kActivation + G;
    of_x_ = quantizer(0), of_h_ = quantizer(1), of_inner_ = quantizer(kOthers + 1);
    input_.low = of_x_.low, hidden_.low = of_h_.low, projection_.low = of_inner_.low;
    for (int g = 0; g < G; ++g) {
      input_.grids[g] = Grid::of(p.table, kInput + g);
      hidden_.grids[g] = Grid::of(p.table, kHidden + g);
      of_gates_[g] = Grid::of(p.table, kActivation + g);
    }
    if (kLstm) of_cell_ = Grid::of(p.table, 2), of_tanh_ = Grid::of(p.table, kOthers);
    take(Scratch(scratch));
  }

  size_t bytes() const { return bytes_; }

  void run() {
    each([&](int part) { begin(part); });
    if (p_.steps == 0) {
      each([&](int part) { end(part); });
      return;
    }
    publish<P>(p_, members_, h_codes_[0], of_h_, h_, outs_of_);
    // The chunk's first step, counted in the order in which they are taken.
    for (int64_t begin = 0; begin < p_.steps; begin += chunk_) {
      const int64_t count = p_.steps - begin < chunk_ ? p_.steps - begin : chunk_;
      // Where they lie in time.
      const int64_t first = p_.reverse ? p_.steps - begin - count : begin;
      each([&](int part) { multiply_inputs(part, first, count); });
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = p_.reverse ? count - 1 - i : i;
        take_step(begin + i, first + at, at, count);
      }
    }
    each([&](int part) { end(part); });
  }

 private:
  template <class Do>
  void each(const Do& work) const {
    for (int part = members_.begin; part < members_.end; ++part) work(part);
  }

  Quantizer quantizer(int64_t part) const {
    Quantizer how{{}, 0};
    if (p_.scheme == Scheme::fixed && (part < 2 || projected_)) {
      how.grid = Grid::of(p_.table, part);
      if (P::kShifts) how.low = static_cast<int32_t>(how.grid.low) - P::kLeast;
    } else if (P::kShifts) {
      how.low = -128 - P::kLeast;
    }
    return how;
  }

  void take(Scratch scratch) {
    const int64_t rows = p_.steps * p_.batch, parts = members_.parts, more = P::kTileRows;
    const int64_t most = div_up(units_, parts);
    const int64_t step_bytes = p_.batch * most * kWidth * static_cast<int64_t>(sizeof(float));
    chunk_ = step_bytes == 0 ? p_.steps : kChunkBytes / step_bytes;
    chunk_ = std::clamp<int64_t>(chunk_, 1, std::max<int64_t>(p_.steps, 1));
    const int64_t state_rows = p_.batch * kLanes;
    x_codes_ = scratch.take<Code>((rows + more) * input_.code_stride());
    x_scales_ = scratch.take<float>(rows);
    const auto operand = [&](const Weight& weight) {
      const int64_t marks = round_up(p_.batch, kLine / 4), stride = weight.code_stride();
      return Operand<P>{scratch.take<Code>((p_.batch + more) * stride), stride,
                        scratch.take<int32_t>(parts * marks), scratch.take<float>(parts * marks),
                        marks};
    };
    for (Operand<P>& o : h_codes_) o = operand(hidden_);
    h_ = scratch.take<float>(outs_ * state_rows);
    c_ = scratch.take<float>(kLstm ? units_ * state_rows : 0);
    if (projected_) {
      inner_codes_ = operand(projection_);
      inner_ = scratch.take<float>(units_ * state_rows);
    }
    const bool once = p_.steps == 1;
    const auto blocks = [&](const Weight& weight) {
      return scratch.take<char>(once ? 0 : weight.blocks * weight.block_bytes());
    };
    input_blocks_ = blocks(input_), hidden_blocks_ = blocks(hidden_);
    if (projected_) projection_blocks_ = blocks(projection_);
    spare_size_ = 0;
    if (once) {
      spare_size_ = std::max(input_.block_bytes(), hidden_.block_bytes());
      if (projected_) spare_size_ = std::max(spare_size_, projection_.block_bytes());
      spare_size_ = round_up(spare_size_, kLine);
    }
    spare_ = scratch.take<char>(parts * spare_size_);
    chunk_size_ = round_up(chunk_ * p_.batch * most * kWidth, kLine);
    chunk_values_ = scratch.take<float>(parts * chunk_size_);
    bytes_ = scratch.used();
  }

  float* state(float* states, int64_t block, int64_t row) const {
    return states + (block * p_.batch + row) * kLanes;
  }

  // A block of a weight: as packed at the beginning, or now, where it is used only once.
  const Block& block_of(const Weight& weight, char* blocks, int64_t index, int part) const {
    if (p_.steps > 1) return *reinterpret_cast<Block*>(blocks + index * weight.block_bytes());
    auto* spare = reinterpret_cast<Block*>(spare_ + part * spare_size_);
    weight.pack(index, spare);
    return *spare;
  }

  QNN_KERNEL void begin(int part) {
    const Run rows = Shares{p_.steps * p_.batch, 1, members_.parts}.of(part),
              own = units_of_.of(part);
    const int64_t stride = input_.code_stride();
    const int64_t padded = std::max(input_.words() * P::kGroup, round_up(p_.inputs, kLanes));
    for (int64_t row = rows.begin; row < rows.end; ++row)
      read_row<P>(p_, of_x_, row, padded, x_codes_ + row * stride, x_scales_ + row);
    if (p_.steps > 1) {
      const auto pack = [](const Weight& weight, char* blocks, const Run& run) {
        for (int64_t i = run.begin; i < run.end; ++i)
          weight.pack(i, reinterpret_cast<Block*>(blocks + i * weight.block_bytes()));
      };
      pack(input_, input_blocks_, own);
      pack(hidden_, hidden_blocks_, own);
      if (projected_) pack(projection_, projection_blocks_, projections_of_.of(part));
    }
    const auto enter = [&](const void* from, const Grid& grid, int64_t width, const Run& run,
                           float* to) {
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t row = 0; row < p_.batch; ++row) {
          const int64_t first = i * kLanes, count = width - first;
          vfloat v = load_floats(p_.dtype, from, row * width + first, count);
          // A NaN or inf does not become a plausible number; v · 0 is NaN then.
          if (p_.table != nullptr) v = round_to(grid, v) + v * 0.0f;
          write(state(to, i, row), first_lanes(v, count));
        }
      }
    };
    enter(p_.h0, Grid::of(p_.table, 1), p_.outputs, outs_of_.of(part), h_);
    if (kLstm) enter(p_.c0, of_cell_, p_.hidden, own, c_);
    if (projected_)
      std::memset(state(inner_, own.begin, 0), 0,
                  (own.end - own.begin) * p_.batch * kLanes * sizeof(float));
  }

  QNN_KERNEL void end(int part) const {
    const auto leave = [&](const float* from, int64_t width, const Run& run, void* to) {
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t row = 0; row < p_.batch; ++row) {
          const int64_t first = i * kLanes;
          store_floats(p_.dtype, to, row * width + first,
                       read<vfloat>(from + (i * p_.batch + row) * kLanes), width - first);
        }
      }
    };
    leave(h_, p_.outputs, outs_of_.of(part), p_.h_n);
    if (kLstm) leave(c_, p_.hidden, units_of_.of(part), p_.c_n);
  }

  // A block times rows, in tiles of an even share. `place(row)` is where a tile's values go,
  // [row][gate][lane], and `use(row, rows, values)` follows them.
  template <class Place, class Use>
  void multiply(const Weight& weight, const Block& block, const Code* codes, int64_t rows,
                const float* scales, const Place& place, const Use& use) const {
    alignas(64) typename P::Acc acc[P::kTileRows * kWidth];
    const int64_t tiles = div_up(rows, P::kTileRows), stride = weight.code_stride();
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = rows * i / tiles, some = rows * (i + 1) / tiles - row;
      P::template multiply<G>(codes + row * stride, stride, some, block.panel(), block.start,
                              weight.words(), acc);
      float* to = place(row);
      scale_sums<P, G>(acc, some, block, weight.bias != nullptr, weight.grids, scales + row, to);
      use(row, some, to);
    }
  }

  // The input linears of a part's units, of all rows of so many steps: [unit
  // block][row][gate][lane].
  QNN_KERNEL void multiply_inputs(int part, int64_t first, int64_t steps) const {
    const Run own = units_of_.of(part);
    const int64_t rows = steps * p_.batch, row = first * p_.batch;
    for (int64_t i = own.begin; i < own.end; ++i) {
      const Block& block = block_of(input_, input_blocks_, i, part);
      float* to = chunk_values_ + part * chunk_size_ + (i - own.begin) * rows * kWidth;
      multiply(
          input_, block, x_codes_ + row * input_.code_stride(), rows, x_scales_ + row,
          [&](int64_t at) { return to + at * kWidth; }, [](int64_t, int64_t, const float*) {});
    }
  }

  // Step number `index`, at time `t`, which is step `at` of the `count` whose input linears are
  // there.
  void take_step(int64_t index, int64_t t, int64_t at, int64_t count) const {
    const bool last = index + 1 == p_.steps;
    const Operand<P>& from = h_codes_[index % 2];
    each([&](int part) {
      const Run own = units_of_.of(part);
      for (int64_t i = own.begin; i < own.end; ++i) {
        const Block& block = block_of(hidden_, hidden_blocks_, i, part);
        const float* of_x =
            chunk_values_ + part * chunk_size_ + ((i - own.begin) * count + at) * p_.batch * kWidth;
        alignas(64) float values[P::kTileRows * kWidth];
        multiply(
            hidden_, block, from.codes, p_.batch, from.scales + part * from.mark_stride,
            [&](int64_t) { return values; },
            [&](int64_t row, int64_t rows, const float* of_h) {
              cells(of_x + row * kWidth, of_h, row, rows, t, i);
            });
      }
    });
    if (projected_) {
      publish<P>(p_, members_, inner_codes_, of_inner_, inner_, units_of_);
      each([&](int part) {
        const Run own = projections_of_.of(part);
        for (int64_t i = own.begin; i < own.end; ++i) project(part, i, t);
      });
    }
    if (!last) publish<P>(p_, members_, h_codes_[(index + 1) % 2], of_h_, h_, outs_of_);
  }

  QNN_KERNEL void project(int part, int64_t index, int64_t t) const {
    const Block& block = block_of(projection_, projection_blocks_, index, part);
    alignas(64) float values[P::kTileRows * kWidth];
    multiply(
        projection_, block, inner_codes_.codes, p_.batch,
        inner_codes_.scales + part * inner_codes_.mark_stride, [&](int64_t) { return values; },
        [&](int64_t first, int64_t rows, const float* of_inner) {
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t g = 0; g < G && index * G + g < outs_; ++g) {
              if (there(t, first + r)) {
                put(read<vfloat>(of_inner + (r * G + g) * kLanes), t, first + r, index * G + g);
              } else {
                put_nothing(t, first + r, index * G + g);
              }
            }
          }
        });
  }

  bool there(int64_t t, int64_t row) const { return p_.lengths == nullptr || t < p_.lengths[row]; }

  // The hidden state and the output of a row and block.
  QNN_KERNEL void put(vfloat h, int64_t t, int64_t row, int64_t block) const {
    const int64_t first = block * kLanes, count = p_.outputs - first;
    h = round_to(of_h_.grid, h);
    h = store_floats(p_.dtype, p_.y, (t * p_.batch + row) * p_.outputs + first, h, count);
    write(state(h_, block, row), first_lanes(h, count));
  }
  void put_nothing(int64_t t, int64_t row, int64_t block) const {
    const int64_t first = block * kLanes;
    store_floats(p_.dtype, p_.y, (t * p_.batch + row) * p_.outputs + first, vfloat{},
                 p_.outputs - first);
  }

  // The cells of a block of units in so many rows.
  QNN_KERNEL void cells(const float* of_x, const float* of_h, int64_t first, int64_t rows,
                        int64_t t, int64_t block) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first + r;
      if (!there(t, row)) {
        if (!projected_) put_nothing(t, row, block);
        continue;
      }
      const float *x = of_x + r * kWidth, *h = of_h + r * kWidth;
      const auto gate = [&](int g) { return read<vfloat>(x + g * kLanes); };
      const auto both = [&](int g) { return gate(g) + read<vfloat>(h + g * kLanes); };
      if constexpr (kLstm) {
        float* at = state(c_, block, row);
        const vfloat i = round_to(of_gates_[0], cell_sigmoid(both(0))),
                     f = round_to(of_gates_[1], cell_sigmoid(both(1))),
                     g = round_to(of_gates_[2], cell_tanh(both(2))),
                     o = round_to(of_gates_[3], cell_sigmoid(both(3)));
        const vfloat c = round_to(of_cell_, f * read<vfloat>(at) + i * g);
        write(at, c);
        const vfloat out = o * round_to(of_tanh_, cell_tanh(c));
        if (projected_) {
          write(state(inner_, block, row), first_lanes(out, p_.hidden - block * kLanes));
        } else {
          put(out, t, row, block);
        }
      } else {
        const vfloat r_gate = round_to(of_gates_[0], cell_sigmoid(both(0))),
                     z = round_to(of_gates_[1], cell_sigmoid(both(1)));
        const vfloat n =
            round_to(of_gates_[2], cell_tanh(gate(2) + r_gate * read<vfloat>(h + 2 * kLanes)));
        put((read<vfloat>(state(h_, block, row)) - n) * z + n, t, row, block);
      }
    }
  }
};

template <class P>
size_t recurrent_bytes(const Recurrent& p, int parts) {
  const Members all{0, parts, parts, nullptr};
  return p.cell == Cell::lstm ? Layer<P, 4>(p, all, nullptr).bytes()
                              : Layer<P, 3>(p, all, nullptr).bytes();
}

template <class P>
void recurrent_run(const Recurrent& p, const Members& members, char* scratch) {
  [[maybe_unused]] const typename P::Session session;
  p.cell == Cell::lstm ? Layer<P, 4>(p, members, scratch).run()
                       : Layer<P, 3>(p, members, scratch).run();
}

template <class P>
constexpr RecurrentKernel recurrent() {
  return {recurrent_bytes<P>, recurrent_run<P>};
}

}  // namespace
}  // namespace qnn

// AMX: tiles of 16 rows of 64 bytes, and one instruction that multiplies 16 × 64 by 64 × 16 signed
// bytes. The left operand is w as it lies in a panel, the right one is x in the blocked form's own
// layout, and the sums come out as in the other tiers. Float activations are multiplied likewise,
// in bfloat16. Few rows are avx512_vnni's.
#define QNN_LANES 16
#include "attention/loops.h"
#include "conv/loops.h"
#include "linear/bfloat16_tier.h"
#include "linear/loops.h"
#include "recurrent/recurrent.h"
#include "tiers/tiers.h"
#include "tiers/vnni512.h"

#ifdef QNN_EMULATE_AMX
#include "amx_emulation.h"
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qnn {
namespace {

struct Amx : Vnni {
  using Panel = int8_t;
  static constexpr int64_t kOffset = 0;
  static constexpr int kPanelRows[2] = {32, 32};

  // The shape of the eight tiles, for as long as a call runs on a thread.
  struct Session {
    Session() {
      alignas(64) uint8_t config[64] = {1};
      for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;  // bytes of a row
        config[48 + tile] = 16;      // rows
      }
      // GCC's intrinsic declares 8 of the 64 bytes as read, so that it may drop the others' stores.
      asm volatile("" : : "r"(config) : "memory");
      _tile_loadconfig(config);
    }
    ~Session() { _tile_release(); }
  };

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    std::memcpy(to, w, depth);
    std::memset(to + depth, 0, round_up(depth, 64) - depth);
  }

  // Sums in tiles 0 to 3, w in 4 and 5, x in 6 and 7.
  template <int R, int G>
  QNN_KERNEL static void block(const Product<Amx>& p) {
    constexpr int64_t panel_stride = kPanelStride<Amx>;
    const int64_t acc_stride = p.acc_stride * 4;
    _tile_loadd(0, p.acc, acc_stride);
    _tile_loadd(1, p.acc + 16 * p.acc_stride, acc_stride);
    if constexpr (G == 2) {
      _tile_loadd(2, p.acc + 16, acc_stride);
      _tile_loadd(3, p.acc + 16 * p.acc_stride + 16, acc_stride);
    }
    for (int64_t word = 0; word < p.words; word += 16) {
      if (p.next != nullptr) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(p.next + r * p.next_stride + word * 4);
      }
      _tile_loadd(6, p.x + word * 64, 64);
      _tile_loadd(4, p.panel + word * 4, panel_stride);
      _tile_loadd(5, p.panel + 16 * panel_stride + word * 4, panel_stride);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 5, 6);
      if constexpr (G == 2) {
        _tile_loadd(7, p.x + p.x_stride + word * 64, 64);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 5, 7);
      }
    }
    _tile_stored(0, p.acc, acc_stride);
    _tile_stored(1, p.acc + 16 * p.acc_stride, acc_stride);
    if constexpr (G == 2) {
      _tile_stored(2, p.acc + 16, acc_stride);
      _tile_stored(3, p.acc + 16 * p.acc_stride + 16, acc_stride);
    }
  }
};

// Up to 16 rows, as they lie, times a panel's block of 16 words: its own layout of the right
// operand. Activations are unsigned here, as in avx512_vnni, to which few rows go.
struct AmxProduct : IntegerProduct<Vnni, 6, 8> {
  using Session = Amx::Session;
  static constexpr int64_t kWordStep = 16, kTileRows = 16, kFewRows = 7;

  // Sums in tiles 0 to 3, activations in 4, w in 5 to 7. Tiles read rows after the last one: the
  // scratch memory is padded, so that is in bounds.
  template <int G>
  QNN_KERNEL static void tiles(const Code* x, int64_t stride, const char* panel,
                               const int32_t* start, int64_t words, Acc* acc) {
    constexpr int64_t kRow = G * 64;
    _tile_loadd(0, start, 0);
    _tile_loadd(1, start + 16, 0);
    _tile_loadd(2, start + 32, 0);
    if constexpr (G == 4) _tile_loadd(3, start + 48, 0);
    for (int64_t word = 0; word < words; word += 16) {
      const char* w = panel + word * kRow;
      _tile_loadd(4, x + word * 4, stride);
      _tile_loadd(5, w, kRow);
      _tile_dpbusd(0, 4, 5);
      _tile_loadd(6, w + 64, kRow);
      _tile_dpbusd(1, 4, 6);
      _tile_loadd(7, w + 128, kRow);
      _tile_dpbusd(2, 4, 7);
      if constexpr (G == 4) {
        _tile_loadd(5, w + 192, kRow);
        _tile_dpbusd(3, 4, 5);
      }
    }
    _tile_stored(0, acc, kRow);
    _tile_stored(1, acc + 16, kRow);
    _tile_stored(2, acc + 32, kRow);
    if constexpr (G == 4) _tile_stored(3, acc + 48, kRow);
  }

  template <int G>
  static void multiply(const Code* x, int64_t stride, int64_t count, const char* panel,
                       const int32_t* start, int64_t words, Acc* acc) {
    if (count > kFewRows) return tiles<G>(x, stride, panel, start, words, acc);
    IntegerProduct::multiply<G>(x, stride, count, panel, start, words, acc);
  }
};

// 16 pixels, as they lie in the image, times 16 channels of a panel.
struct AmxConv : IntegerConv<Vnni> {
  using Session = Amx::Session;
  static constexpr int64_t kTileWords = 16, kPixels = 16;

  // Pixels of a strip whose windows lie `step` bytes apart.
  struct Square {
    int64_t first, step;
  };

  // R squares × B vectors. Sums in tiles 0 to 3, pixels in 4 and 5, w in 6 and 7.
  template <int R, int B>
  QNN_KERNEL static void block(const ConvTile& tile, const Square* squares) {
    const auto* start = static_cast<const int32_t*>(tile.start);
    const int64_t acc_stride = tile.acc_stride * 4, panel_step = tile.panel_step;
    auto* acc = static_cast<int32_t*>(tile.acc);
    const int64_t step0 = squares[0].step, step1 = squares[R - 1].step;
    const char* x0 = tile.image + tile.at[squares[0].first];
    const char* x1 = tile.image + tile.at[squares[R - 1].first];
    _tile_loadd(0, start, 0);
    if constexpr (B == 2) _tile_loadd(1, start + 16, 0);
    if constexpr (R == 2) _tile_loadd(2, start, 0);
    if constexpr (R == 2 && B == 2) _tile_loadd(3, start + 16, 0);
    const char* w = tile.panel;
    const ConvRun* const end = tile.runs + tile.run_count;
    for (const ConvRun* run = tile.runs; run != end; ++run) {
      const int64_t until = run->offset + run->words * 4;
      for (int64_t i = run->offset; i < until; i += 64, w += 16 * panel_step) {
        _tile_loadd(6, w, panel_step);
        _tile_loadd(4, x0 + i, step0);
        _tile_dpbusd(0, 4, 6);
        if constexpr (B == 2) {
          _tile_loadd(7, w + 64, panel_step);
          _tile_dpbusd(1, 4, 7);
        }
        if constexpr (R == 2) {
          _tile_loadd(5, x1 + i, step1);
          _tile_dpbusd(2, 5, 6);
        }
        if constexpr (R == 2 && B == 2) _tile_dpbusd(3, 5, 7);
      }
    }
    int32_t *to0 = acc + squares[0].first * tile.acc_stride,
            *to1 = acc + squares[R - 1].first * tile.acc_stride;
    _tile_stored(0, to0, acc_stride);
    if constexpr (B == 2) _tile_stored(1, to0 + 16, acc_stride);
    if constexpr (R == 2) _tile_stored(2, to1, acc_stride);
    if constexpr (R == 2 && B == 2) _tile_stored(3, to1 + 16, acc_stride);
  }

  // The squares of a strip; none where one would go `beyond` the last pixel and must not. A square
  // of fewer pixels has the next ones' places in acc as well, which are written after it.
  static int64_t squares_of(const int64_t* at, int64_t pixels, bool beyond, Square* to) {
    int64_t count = 0;
    for (int64_t first = 0; first < pixels;) {
      const int64_t step = first + 1 < pixels ? at[first + 1] - at[first] : 0;
      int64_t end = first + 1;
      while (end < pixels && at[end] - at[end - 1] == step) ++end;
      for (int64_t i = first; i < end; i += kPixels) {
        const bool back = end - i < kPixels && end - first >= kPixels;
        if (!back && !beyond && end - i < kPixels) return 0;
        to[count++] = {back ? end - kPixels : i, step};
      }
      first = end;
    }
    return count;
  }

  template <int B>
  static void squares(const ConvTile& tile, const Square* all, int64_t count) {
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) block<2, B>(tile, all + i);
    if (i < count) block<1, B>(tile, all + i);
  }

  // Whether it could.
  static bool tiles(int64_t vectors, int64_t pixels, ConvTile strip, bool beyond) {
    Square all[64];
    const int64_t count = squares_of(strip.at, pixels, beyond, all);
    if (count == 0) return false;
    for (int64_t b = 0; b < vectors;) {
      const int64_t some = smaller(2, vectors - b);
      some == 2 ? squares<2>(strip, all, count) : squares<1>(strip, all, count);
      b += some;
      strip.panel += some * kLanes * 4;
      strip.start = static_cast<const int32_t*>(strip.start) + some * kLanes;
      strip.acc = static_cast<int32_t*>(strip.acc) + some * kLanes;
    }
    return true;
  }
};

// Attention, 16 rows a tile. Both operands of the scores are signed; the weights are unsigned, in
// two planes, and in the order in which they are cheapest to write.
struct AmxAttention : AttentionProduct<Vnni> {
  using Session = Amx::Session;
  static constexpr bool kSigned = true, kMixes = true;
  static constexpr int64_t kTileRows = 16, kRows = 32;

  // Sums in tiles 0 to 3, queries in 4, keys in 5 to 7. Tiles read rows after the last one, and
  // write sums of them: the memory of a thread has room for whole tiles.
  template <int G>
  QNN_KERNEL static void scores(int64_t, const Code* q, int64_t stride, const char* panel,
                                const int32_t*, int64_t words, int32_t* acc) {
    constexpr int64_t kRow = G * 64;
    _tile_zero(0);
    if constexpr (G > 1) _tile_zero(1);
    if constexpr (G > 2) _tile_zero(2);
    if constexpr (G > 3) _tile_zero(3);
    for (int64_t word = 0; word < words; word += 16) {
      const char* k = panel + word * kRow;
      _tile_loadd(4, q + word * 4, stride);
      _tile_loadd(5, k, kRow);
      _tile_dpbssd(0, 4, 5);
      if constexpr (G > 1) {
        _tile_loadd(6, k + 64, kRow);
        _tile_dpbssd(1, 4, 6);
      }
      if constexpr (G > 2) {
        _tile_loadd(7, k + 128, kRow);
        _tile_dpbssd(2, 4, 7);
      }
      if constexpr (G > 3) {
        _tile_loadd(5, k + 192, kRow);
        _tile_dpbssd(3, 4, 5);
      }
    }
    _tile_stored(0, acc, kRow);
    if constexpr (G > 1) _tile_stored(1, acc + 16, kRow);
    if constexpr (G > 2) _tile_stored(2, acc + 32, kRow);
    if constexpr (G > 3) _tile_stored(3, acc + 48, kRow);
  }

  // Sums of the planes of one or two groups in tiles 0 to 3, weights in 4 and 5, values in 6 and 7.
  template <bool kTwo>
  QNN_KERNEL static void planes(const Code* weights, int64_t plane, int64_t stride,
                                const char* panel, int64_t row, int64_t words, bool onto,
                                int32_t* high, int32_t* low) {
    if (onto) {
      _tile_loadd(0, high, row);
      _tile_loadd(1, low, row);
      if constexpr (kTwo) {
        _tile_loadd(2, high + 16, row);
        _tile_loadd(3, low + 16, row);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kTwo) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    for (int64_t word = 0; word < words; word += 16) {
      const char* v = panel + word * row;
      _tile_loadd(6, v, row);
      _tile_loadd(4, weights + word * 4, stride);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(5, weights + plane + word * 4, stride);
      _tile_dpbusd(1, 5, 6);
      if constexpr (kTwo) {
        _tile_loadd(7, v + 64, row);
        _tile_dpbusd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
      }
    }
    _tile_stored(0, high, row);
    _tile_stored(1, low, row);
    if constexpr (kTwo) {
      _tile_stored(2, high + 16, row);
      _tile_stored(3, low + 16, row);
    }
  }

  template <int G>
  static void values(int64_t, const Code* weights, int64_t plane, int64_t stride, const char* panel,
                     int64_t words, bool onto, int32_t* high, int32_t* low) {
    constexpr int64_t kRow = G * 64, kLast = G - 1;
    for (int g = 0; g + 2 <= G; g += 2)
      planes<true>(weights, plane, stride, panel + g * 64, kRow, words, onto, high + g * 16,
                   low + g * 16);
    if constexpr (G % 2 != 0)
      planes<false>(weights, plane, stride, panel + kLast * 64, kRow, words, onto,
                    high + kLast * 16, low + kLast * 16);
  }
};

size_t int8_bytes(const Linear& p) {
  return p.m <= Vnni::kDotRows ? avx512_vnni.int8.scratch_bytes(p) : Blocked<Amx>::scratch_bytes(p);
}

void int8_run(const Linear& p, int part, int parts, char* scratch) {
  p.m <= Vnni::kDotRows ? avx512_vnni.int8.run(p, part, parts, scratch)
                        : Blocked<Amx>::run(p, part, parts, scratch);
}

// -- products of bfloat16, of the layers whose activations stay floats

struct Bfloat16Tiles : Avx512 {
  using Session = Amx::Session;
  static constexpr int64_t kDepth = 512, kWordStep = 16, kParts = 1;
  static constexpr int64_t kTileBytes = 1 << 21;
  static constexpr int kPanelRows[2] = {32, 32};
};

// tdpbf16ps: 16 × 32 by 32 × 16 values. Of x in several parts each meets the same tiles of w.
template <int Parts>
struct AmxBfloat16 : Bfloat16Tier<Bfloat16Tiles> {
  static constexpr int64_t kParts = Parts;

  template <int R, int G>
  QNN_KERNEL static void block(const Product<AmxBfloat16>& p) {
    const int64_t acc_stride = p.acc_stride * 4;
    if (p.group == 0) {
      _tile_loadd(0, p.acc, acc_stride);
      _tile_loadd(1, p.acc + 16 * p.acc_stride, acc_stride);
      if constexpr (G == 2) {
        _tile_loadd(2, p.acc + 16, acc_stride);
        _tile_loadd(3, p.acc + 16 * p.acc_stride + 16, acc_stride);
      }
      multiply<R, G>(p, 0, p.words);
      return store<G>(p.acc, acc_stride);
    }
    // The sums of a group, and then they times its scales, one in each row of the panel. A cleared
    // row has none: its sums are 0, and nobody reads what becomes of them.
    alignas(64) float sums[R * G * 16];
    for (int64_t word = 0; word < p.words; word += p.group) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (G == 2) {
        _tile_zero(2);
        _tile_zero(3);
      }
      multiply<R, G>(p, word, smaller(word + p.group, p.words));
      store<G>(sums, G * 64);
      for (int r = 0; r < R; ++r) {
        const vfloat scale =
            splat(panel_scales(AmxBfloat16::panel_row(p.panel, r))[word / p.group]);
        for (int g = 0; g < G; ++g) {
          float* to = p.acc + r * p.acc_stride + g * 16;
          write(to, fma(read<vfloat>(sums + (r * G + g) * 16), scale, read<vfloat>(to)));
        }
      }
    }
  }

  // Onto tiles 0 to 3; w in 4 and 5, x in 6 and 7.
  template <int R, int G>
  static QNN_INLINE void multiply(const Product<AmxBfloat16>& p, int64_t begin, int64_t end) {
    const Panel *w = p.panel, *second = AmxBfloat16::panel_row(p.panel, 16);
    for (int64_t word = begin; word < end; word += 16) {
      // 32 codes: a line of bytes, or of halves of a byte, lasts for more than one step.
      if (p.next != nullptr && word % (32 << p.next_shift) == 0) {
        for (int r = 0; r < R; ++r)
          __builtin_prefetch(p.next + r * p.next_stride + (word * 2 >> p.next_shift));
      }
      _tile_loadd(4, w + word * 32, 64);
      _tile_loadd(5, second + word * 32, 64);
      const Code* x = p.x + word * Parts * 32;
#pragma GCC unroll 3
      for (int part = 0; part < Parts; ++part) {
        _tile_loadd(6, x + part * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (G == 2) {
          _tile_loadd(7, x + p.x_stride + part * 512, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }

  template <int G>
  static QNN_INLINE void store(float* to, int64_t stride) {
    _tile_stored(0, to, stride);
    _tile_stored(1, to + 4 * stride, stride);
    if constexpr (G == 2) {
      _tile_stored(2, to + 16, stride);
      _tile_stored(3, to + 4 * stride + 16, stride);
    }
  }
};

// Whether the CPU has these products, asked once: in a virtual machine the question takes a while.
bool has_bfloat16() {
#ifdef QNN_EMULATE_AMX
  return true;
#else
  static const bool has = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0;
  }();
  return has;
#endif
}

bool in_bfloat16(const Linear& p) {
  return p.m > Avx512::kDotRows && AmxBfloat16<1>::takes(p.weight) && has_bfloat16();
}

// Run by the tier for as many parts of bfloat16 as make up a value of x.
template <class Run>
auto with_parts(DType dtype, const Run& run) {
  return dtype == DType::bfloat16  ? run(Blocked<AmxBfloat16<1>>{})
         : dtype == DType::float16 ? run(Blocked<AmxBfloat16<2>>{})
                                   : run(Blocked<AmxBfloat16<3>>{});
}

size_t weight_only_bytes(const Linear& p) {
  if (!in_bfloat16(p)) return avx512_vnni.weight_only.scratch_bytes(p);
  return with_parts(p.x_dtype, [&](auto tier) { return decltype(tier)::scratch_bytes(p); });
}

void weight_only_run(const Linear& p, int part, int parts, char* scratch) {
  if (!in_bfloat16(p)) return avx512_vnni.weight_only.run(p, part, parts, scratch);
  with_parts(p.x_dtype, [&](auto tier) { decltype(tier)::run(p, part, parts, scratch); });
}

// --

bool runs_here() {
#ifdef QNN_EMULATE_AMX
  return vnni512_runs_here();
#else
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if (!vnni512_runs_here() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTile) == 0 ||
      (d & kInt8) == 0)
    return false;
  // Linux lets a process use the tiles once it has asked (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#endif
}

}  // namespace

constexpr Tier amx = [] {
  Tier t{};
  t.name = "amx";
  t.runs_here = runs_here;
  t.base = &avx512_vnni;
  t.int8 = {int8_bytes, int8_run};
  t.weight_only = {weight_only_bytes, weight_only_run};
  t.recurrent = recurrent<AmxProduct>();
  t.conv = conv<AmxConv>();
  t.attention = attention<AmxAttention>();
  return t;
}();

}  // namespace qnn

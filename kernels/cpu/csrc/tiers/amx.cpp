// AMX: tiles of 16 rows of 64 bytes, and one instruction that multiplies 16 × 64 by 64 × 16 signed
// bytes. The left operand is w as it lies in a panel, the right one is x in the blocked form's own
// layout, and the sums come out as in the other tiers. Few rows, and float
// activations, are avx512_vnni's.
#define QNN_LANES 16
#include "attention/loops.h"
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
  t.recurrent = recurrent<AmxProduct>();
  t.attention = attention<AmxAttention>();
  return t;
}();

}  // namespace qnn

// The emulated product of bfloat16 against the CPU's own, to the bit: random values, numbers that
// are not normal, inf and NaN. Ends with 0 where all are equal, with 2 where the CPU has none.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

namespace {

struct Operands {
  alignas(64) float sum[16][16];
  alignas(64) uint16_t a[16][32], b[16][32];
};

struct Shape {
  alignas(64) uint8_t config[64] = {1};
  Shape() {
    for (int tile = 0; tile < 3; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
  }
};

void real(Operands& o) {
  const Shape shape;
  asm volatile("" : : "r"(shape.config) : "memory");
  _tile_loadconfig(shape.config);
  _tile_loadd(0, o.sum, 64);
  _tile_loadd(1, o.a, 64);
  _tile_loadd(2, o.b, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, o.sum, 64);
  _tile_release();
}

bool has_unit() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kBfloat16 = 1u << 22;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTile) == 0 || (d & kBfloat16) == 0)
    return false;
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

#include "amx_emulation.h"

namespace {

void emulated(Operands& o) {
  const Shape shape;
  _tile_loadconfig(shape.config);
  _tile_loadd(0, o.sum, 64);
  _tile_loadd(1, o.a, 64);
  _tile_loadd(2, o.b, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, o.sum, 64);
  _tile_release();
}

bool same(float x, float y) { return (x != x && y != y) || std::memcmp(&x, &y, sizeof x) == 0; }

}  // namespace

int main() {
  if (!has_unit()) return 2;
  std::mt19937 random(1);
  for (int round = 0; round < 400; ++round) {
    Operands o;
    // Exponents in a range that differs from round to round: all, small ones, or near 1.
    const int low = round % 4 == 0   ? 0
                    : round % 4 == 1 ? 0
                    : round % 4 == 2 ? 60
                                     : 120,
              high = round % 4 == 0   ? 255
                     : round % 4 == 1 ? 70
                     : round % 4 == 2 ? 70
                                      : 134;
    const auto half = [&] {
      const unsigned exponent = low + random() % (high - low + 1);
      return static_cast<uint16_t>((random() & 1) << 15 | exponent << 7 | (random() & 127));
    };
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 32; ++j) o.a[i][j] = half(), o.b[i][j] = half();
      for (int j = 0; j < 16; ++j) {
        const uint32_t bits = static_cast<uint32_t>(half()) << 16 | (random() & 0xffff);
        std::memcpy(&o.sum[i][j], &bits, sizeof bits);
      }
    }
    Operands other = o;
    real(o);
    emulated(other);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        if (same(o.sum[i][j], other.sum[i][j])) continue;
        std::printf("round %d [%d, %d]: the unit gives %a, the emulation %a\n", round, i, j,
                    o.sum[i][j], other.sum[i][j]);
        return 1;
      }
    }
  }
  return 0;
}

// The AMX instructions that amx.cpp uses, in software, so that its code runs and is tested on any
// CPU with AVX-512-VNNI. They do what the operation sections of Intel's manual say (volume 2:
// LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBSSD, TDPBUSD, TDPBF16PS), and end the process
// where the CPU would raise a fault.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// The compiler's header defines some of these names as macros and the others as functions.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_zero
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig qnn::emulated::loadconfig
#define _tile_release qnn::emulated::release
#define _tile_zero qnn::emulated::zero
#define _tile_loadd qnn::emulated::loadd
#define _tile_stored qnn::emulated::stored
#define _tile_dpbssd qnn::emulated::dpbssd
#define _tile_dpbusd qnn::emulated::dpbusd
#define _tile_dpbf16ps qnn::emulated::dpbf16ps

namespace qnn {
namespace emulated {
namespace {

struct Tile {
  int rows, row_bytes;
  alignas(64) uint8_t data[16][64];
};

struct Tiles {
  bool configured = false;
  Tile tile[8] = {};
  ~Tiles();
};

inline thread_local Tiles tiles;

inline void require(bool holds, const char* instruction, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "emulated %s faults: %s\n", instruction, rule);
  std::abort();
}

inline Tiles::~Tiles() { require(!configured, "thread end", "the tiles were not released"); }

inline void loadconfig(const void* memory) {
  uint8_t config[64];
  std::memcpy(config, memory, sizeof config);
  require(config[0] == 1, "ldtilecfg", "the palette is not 1");
  require(config[1] == 0, "ldtilecfg", "the start row is not 0");
  const auto zero = [&](int begin, int end) {
    for (int i = begin; i < end; ++i)
      require(config[i] == 0, "ldtilecfg", "a reserved byte is not 0");
  };
  zero(2, 16), zero(32, 48), zero(56, 64);
  for (int i = 0; i < 8; ++i) {
    Tile& t = tiles.tile[i];
    t.row_bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, t.rows = config[48 + i];
    require(t.row_bytes <= 64 && t.rows <= 16, "ldtilecfg",
            "a tile is larger than 16 rows of 64 bytes");
    require((t.row_bytes == 0) == (t.rows == 0), "ldtilecfg",
            "a tile has rows without bytes, or bytes without rows");
    std::memset(t.data, 0, sizeof t.data);
  }
  tiles.configured = true;
}

inline void release() {
  tiles.configured = false;
  std::memset(tiles.tile, 0, sizeof tiles.tile);
}

inline Tile& configured(int index, const char* instruction) {
  require(tiles.configured, instruction, "no configuration is loaded");
  require(index >= 0 && index < 8, instruction, "there are eight tiles");
  Tile& t = tiles.tile[index];
  require(t.rows > 0 && t.row_bytes > 0, instruction, "the tile is not configured");
  return t;
}

inline void loadd(int index, const void* base, int64_t stride) {
  Tile& t = configured(index, "tileloadd");
  std::memset(t.data, 0, sizeof t.data);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(t.data[r], static_cast<const char*>(base) + r * stride, t.row_bytes);
  }
}

inline void zero(int index) {
  Tile& t = configured(index, "tilezero");
  std::memset(t.data, 0, sizeof t.data);
}

inline void stored(int index, void* base, int64_t stride) {
  const Tile& t = configured(index, "tilestored");
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, t.data[r], t.row_bytes);
}

// The three tiles of a product of words.
inline void require_shapes(const char* name, int sum_index, int a_index, int b_index) {
  const Tile &sum = configured(sum_index, name), &a = configured(a_index, name),
             &b = configured(b_index, name);
  require(sum_index != a_index && a_index != b_index && sum_index != b_index, name,
          "the three tiles are not distinct");
  require(sum.rows == a.rows && sum.row_bytes == b.row_bytes, name,
          "the sum has not the shape of the product");
  require(a.row_bytes == 4 * b.rows && b.row_bytes % 4 == 0, name,
          "the operands' inner sizes differ");
}

// sum[m][n] += a[m][4 k … 4 k + 3] · b[k][4 n … 4 n + 3], bytes of type A by signed ones, 32-bit
// sums that wrap.
template <class A>
void multiply(const char* name, int sum_index, int a_index, int b_index) {
  require_shapes(name, sum_index, a_index, b_index);
  Tile& sum = tiles.tile[sum_index];
  const Tile &a = tiles.tile[a_index], &b = tiles.tile[b_index];
  for (int m = 0; m < a.rows; ++m) {
    uint32_t row[16];
    std::memcpy(row, sum.data[m], sizeof row);
    for (int k = 0; k < b.rows; ++k) {
      for (int n = 0; n < b.row_bytes / 4; ++n) {
        int32_t products = 0;
        for (int i = 0; i < 4; ++i) {
          products +=
              static_cast<A>(a.data[m][4 * k + i]) * static_cast<int8_t>(b.data[k][4 * n + i]);
        }
        row[n] += static_cast<uint32_t>(products);
      }
    }
    std::memcpy(sum.data[m], row, sizeof row);
  }
}

inline void dpbssd(int sum, int a, int b) { multiply<int8_t>("tdpbssd", sum, a, b); }
inline void dpbusd(int sum, int a, int b) { multiply<uint8_t>("tdpbusd", sum, a, b); }

// A number that is not normal counts as 0, of its sign.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float widened(const uint8_t* bfloat16) {
  uint8_t bytes[4] = {0, 0, bfloat16[0], bfloat16[1]};
  float x;
  std::memcpy(&x, bytes, sizeof x);
  return flushed(x);
}

// A product onto a sum, rounded once.
inline float multiplied(const uint8_t* a, const uint8_t* b, float onto) {
  return flushed(std::fma(widened(a), widened(b), onto));
}

// sum[m][n] += Σ a[m][2 k] · b[k][2 n] + Σ a[m][2 k + 1] · b[k][2 n + 1], bfloat16, in float32 to
// nearest, ties to even, whatever the mode of the CPU: the two sums over k begin at 0, are added to
// each other and then to the tile.
inline void dpbf16ps(int sum_index, int a_index, int b_index) {
  require_shapes("tdpbf16ps", sum_index, a_index, b_index);
  Tile& sum = tiles.tile[sum_index];
  const Tile &a = tiles.tile[a_index], &b = tiles.tile[b_index];
  for (int m = 0; m < a.rows; ++m) {
    for (int n = 0; n < b.row_bytes / 4; ++n) {
      float even = 0, odd = 0, all;
      for (int k = 0; k < b.rows; ++k) {
        even = multiplied(a.data[m] + 4 * k, b.data[k] + 4 * n, even);
        odd = multiplied(a.data[m] + 4 * k + 2, b.data[k] + 4 * n + 2, odd);
      }
      std::memcpy(&all, sum.data[m] + 4 * n, sizeof all);
      all = flushed(flushed(all) + flushed(even + odd));
      std::memcpy(sum.data[m] + 4 * n, &all, sizeof all);
    }
  }
}

}  // namespace
}  // namespace emulated
}  // namespace qnn

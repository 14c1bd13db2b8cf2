// Keys and values kept in int8 from call to call: tokens are appended, and queries attend to them,
// as kernels/reference/attention.py says it.
#pragma once

#include "attention/attention.h"

namespace qnn {

// Codes [batch, heads, places, columns], the columns dense, and the scale of each row, a place
// after the other; strides in values.
struct CodeRows {
  int8_t* codes;
  int64_t batch, head, row;
  float* scales;
  int64_t scale_batch, scale_head;
};

// `n` tokens of `k` and `v`, to the places from `length` on of each sequence.
struct CacheAppend {
  int64_t b, g, n, d, e;
  DType dtype;  // of k and v
  Rows k, v;
  CodeRows keys, values;
  const int64_t* length;
  int64_t length_stride;
};

struct CachedAttention {
  Attention call;  // n: the places, which a mask has too; k and v are not there
  CodeRows keys, values;
  const int64_t* length;  // of each sequence, the tokens that are there
  int64_t length_stride;

  int64_t tokens(int64_t sequence) const { return length[sequence * length_stride]; }
  // Of all heads that share keys, or of each where their masks differ.
  bool gain_each() const { return call.mask.values != nullptr && call.mask.head != 0; }
};

// Queries that are worked on at once. One query a head is taken with those of the other heads that
// share its keys. Fewer where there are many keys: scores and weights stay in the second-level
// cache.
struct CacheBlocks {
  explicit CacheBlocks(const Attention& p)
      : heads_at_once(p.m == 1),
        rows(p.n <= 1536   ? 24
             : p.n <= 6144 ? 12
                           : 6),
        blocks((heads_at_once ? p.each() : p.m) / rows +
               ((heads_at_once ? p.each() : p.m) % rows != 0 ? 1 : 0)),
        count(p.b * p.g * (heads_at_once ? 1 : p.each()) * blocks) {}
  bool heads_at_once;
  int64_t rows, blocks, count;
};
constexpr int64_t kMostCacheRows = 24;

// `append` works on one of b · g heads; `gains` on one of b · h, or of b · g where they are of all
// queries that share keys, to a place of `gain_bytes`; `rows` on one of CacheBlocks::count. Each
// call has a memory of its own.
struct CacheKernel {
  size_t (*append_bytes)(const CacheAppend&);
  void (*append)(const CacheAppend&, int64_t head, char* scratch);
  size_t (*gain_bytes)(const CachedAttention&);
  size_t (*scratch_bytes)(const CachedAttention&);
  void (*gains)(const CachedAttention&, int64_t head, char* to, char* scratch);
  void (*rows)(const CachedAttention&, int64_t block, const char* gains, char* scratch);
};

}  // namespace qnn

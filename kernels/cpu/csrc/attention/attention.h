// One call of attention in integers, as kernels/reference/attention.py says it, and what a tier has
// for it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace qnn {

// Values [batch, heads, rows, columns], the columns dense; strides in values.
struct Rows {
  const void* values;
  int64_t batch, head, row;
};

struct Attention {
  int64_t b, h, g, m, n, d, e;  // g heads of keys and values, each for h / g of queries
  DType dtype;                  // of q, k, v and y
  Rows q, k, v;
  Rows mask;         // values null: none; strides 0 where it is 1 along an axis
  int64_t mask_key;  // its stride along keys, 0 or 1
  bool mask_is_bool;
  DType mask_dtype;  // else
  float unit;        // of scores: scale · log2(e) · 1024
  bool causal;
  void* y;  // [b, m, h, e], dense

  int64_t each() const { return h / g; }
};

// Keys and values of a head are packed once, in memory of `head_bytes`; then rows of the heads of
// queries that they serve, in any number of calls, each with memory of its own.
struct AttentionKernel {
  size_t (*head_bytes)(const Attention&);
  size_t (*scratch_bytes)(const Attention&);
  void (*pack)(const Attention&, int64_t head_of_keys, char* packed, char* scratch);
  void (*rows)(const Attention&, int64_t head, int64_t first, int64_t count, const char* packed,
               char* scratch);
};

}  // namespace qnn

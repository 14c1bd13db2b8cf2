// What one lookup in a quantised table is: the border between embedding_ops.cpp, which knows torch,
// and the tiers.
#pragma once

#include "linear/linear.h"

namespace qnn {

enum class Bag { sum, mean, max };

// Rows of a table, or, where `offsets` is given, bags of rows. Row-major and dense: ids and weights
// [count], offsets [bags + 1], y [count, k] or [bags, k] in `y_dtype` of `table`, which has the
// table as the weight [n, k] of a layer has it. Every id that is not `padding` is a row of the
// table. The meaning, but for the order of a bag's sums to the bit, is the reference in
// kernels/reference/embedding.py.
struct Lookup {
  Linear table;
  const void* ids;
  bool wide;  // ids are int64, else int32
  int64_t count;
  const int64_t* offsets;  // or null
  int64_t bags;
  const void* weights;  // in y_dtype, or null
  Bag mode;
  int64_t padding;  // rows that take no part in a bag; negative: none

  int64_t id(int64_t i) const {
    return wide ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
  }
};

}  // namespace qnn

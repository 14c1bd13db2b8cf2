// The tiers, best first. Each stands in the file of its name, compiled for its own instruction set.
#pragma once

#include "linear.h"

namespace qnn {

extern const Tier amx, avx512_vnni, avx_vnni, avx2, portable;

}  // namespace qnn

// Which tier runs: the best that the CPU has and that gives right results.
#pragma once

#include <string>

#include "tiers/tiers.h"

namespace qnn {

// Chosen once a process.
const Tier& best_tier();

// Throws where there is none of that name, or it cannot run here.
const Tier& tier_called(const std::string& name);

// "amx:this CPU lacks the instructions,avx512_vnni:ok,…", the best first.
std::string cpu_tiers();

}  // namespace qnn

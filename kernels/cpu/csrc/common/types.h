// What both sides of the border between torch and the tiers name.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qnn {

enum class DType { float32, bfloat16, float16, float64 };
enum class Activation { none, relu, gelu, gelu_tanh, silu, relu6, hardswish, hardsigmoid };
constexpr const char* kActivations[] = {"none", "relu",  "gelu",      "gelu_tanh",
                                        "silu", "relu6", "hardswish", "hardsigmoid"};

// A tier's own, as all that is inline: the linker would keep one copy for all tiers.
namespace {

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

}  // namespace
}  // namespace qnn

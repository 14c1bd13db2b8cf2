// Activations of float64 values, of which one at a time will do: nobody waits for them.
#pragma once

#include <cmath>

#include "common/types.h"

namespace qnn {
namespace {

inline double activate(Activation activation, double x) {
  const auto up_to_6 = [](double v) { return v < 0 ? 0 : v > 6 ? 6 : v; };
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0 ? 0 : x;
    case Activation::gelu:
      return x * 0.5 * (1 + std::erf(x * 0.70710678118654752));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::relu6:
      return up_to_6(x);
    case Activation::hardswish:
      return x * up_to_6(x + 3) / 6;
    case Activation::hardsigmoid:
      return up_to_6(x + 3) / 6;
  }
  return x;
}

}  // namespace
}  // namespace qnn

// The ops of kernels/declare/norm.py on the CPU: a residual, a norm, and codes.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "norm/norm.h"
#include "ops/arguments.h"
#include "ops/linear_call.h"
#include "ops/threads.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

// What an op gives beside codes and scales, by which it is named.
template <bool kGivesSum, bool kGivesNormed>
struct Results {
  static constexpr bool kSum = kGivesSum, kNormed = kGivesNormed;
  static std::string name(bool fixed) {
    return std::string(fixed ? "int8_static_" : "int8_") + (kSum ? "sum_" : "") +
           (kNormed ? "fork_" : "") + "norm";
  }
  static auto of(const Tensor& sum, const Tensor& y, const Tensor& codes, const Tensor& scales) {
    if constexpr (kSum && kNormed) {
      return std::make_tuple(sum, y, codes, scales);
    } else if constexpr (kSum || kNormed) {
      return std::make_tuple(kSum ? sum : y, codes, scales);
    } else {
      return std::make_tuple(codes, scales);
    }
  }
};

struct NormCall {
  const Tensor& x;
  const Tensor *sx, *zx;  // or null
  double eps;
  const Maybe &weight, &bias, &residual;
  const std::string& kind;
};

template <class Given>
auto normalise(const Tier& tier, const NormCall& a) {
  static const Signature &dynamic = signature_of(Given::name(false)),
                         &fixed = signature_of(Given::name(true));
  const std::optional<double> eps = a.eps;
  Arguments args(a.sx == nullptr ? dynamic : fixed, a.x, a.sx, a.zx, eps, a.weight, a.bias,
                 a.residual, a.kind);
  std::vector<int64_t> sizes(a.x.dim());
  for (int64_t i = 0; i < a.x.dim(); ++i) sizes[i] = a.x.size(i);
  const auto floats = [&](bool given) {
    return given ? args.empty(sizes, a.x.scalar_type()) : a.x;
  };
  const Tensor sum = floats(Given::kSum), y = floats(Given::kNormed);
  const Tensor codes = args.empty(sizes, ScalarType::Char);
  Norm p{};
  p.k = sizes.back();
  sizes.back() = 1;
  const Tensor scales = args.empty(sizes, ScalarType::Float);
  p.m = scales.numel();
  p.kind = static_cast<NormKind>(std::find(std::begin(kNorms), std::end(kNorms), a.kind) -
                                 std::begin(kNorms));
  p.eps = static_cast<float>(a.eps);
  p.x = args.data(a.x), p.residual = args.data(a.residual), p.dtype = float_format(a.x);
  p.weight = args.data(a.weight), p.bias = args.data(a.bias);
  if (p.weight != nullptr) p.weight_dtype = float_format(*a.weight);
  if (p.bias != nullptr) p.bias_dtype = float_format(*a.bias);
  if (a.sx != nullptr) {
    p.fixed = true, p.grid_scale = usable_scale(*args.data<float>(*a.sx));
    p.zero_point = *args.data<int8_t>(*a.zx);
  }
  if (Given::kSum) p.sum = sum.data_ptr();
  if (Given::kNormed) p.y = y.data_ptr();
  p.codes = static_cast<int8_t*>(codes.data_ptr());
  p.scales = static_cast<float*>(scales.data_ptr());
  // A thread more is worth its start, some µs, from so many values to each.
  constexpr int64_t kValues = 1 << 15;
  with_memory(args, [&] {
    share(p.m * p.k / kValues, [&](int part, int parts) {
      tier.norm(p, part, parts, scratch_of_this_thread(norm_bytes(p)));
    });
  });
  return Given::of(sum, y, codes, scales);
}

template <class Given>
auto norm(const Tensor& x, double eps, const Maybe& weight, const Maybe& bias,
          const Maybe& residual, const std::string& kind) {
  return normalise<Given>(best_tier(), {x, nullptr, nullptr, eps, weight, bias, residual, kind});
}

template <class Given>
auto static_norm(const Tensor& x, const Tensor& sx, const Tensor& zx, double eps,
                 const Maybe& weight, const Maybe& bias, const Maybe& residual,
                 const std::string& kind) {
  return normalise<Given>(best_tier(), {x, &sx, &zx, eps, weight, bias, residual, kind});
}

template <class Given>
bool add_norms() {
  const std::string dynamic = Given::name(false), fixed = Given::name(true);
  return add_ops({{dynamic.c_str(), TORCH_BOX(&norm<Given>)},
                  {fixed.c_str(), TORCH_BOX(&static_norm<Given>)}});
}

// For tests: all results, in the named tier.
std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_norm(Tensor x, Maybe sx, Maybe zx, double eps,
                                                    Maybe weight, Maybe bias, Maybe residual,
                                                    std::string kind, std::string tier) {
  const bool fixed = sx.has_value();
  if (fixed != zx.has_value()) throw std::invalid_argument("qnn::cpu_norm: sx without zx.");
  return normalise<Results<true, true>>(
      tier_called(tier),
      {x, fixed ? &*sx : nullptr, fixed ? &*zx : nullptr, eps, weight, bias, residual, kind});
}

[[maybe_unused]] const bool added =
    add_norms<Results<false, false>>() && add_norms<Results<false, true>>() &&
    add_norms<Results<true, false>>() && add_norms<Results<true, true>>();

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def(
      "cpu_norm(Tensor x, Tensor? sx, Tensor? zx, float eps, Tensor? weight, Tensor? bias, Tensor? "
      "residual, str kind, str tier) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) { m.impl("cpu_norm", TORCH_BOX(&qnn::cpu_norm)); }

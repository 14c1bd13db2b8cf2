// The ops of kernels/declare/attention.py on the CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "attention/attention.h"
#include "ops/arguments.h"
#include "ops/threads.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

// What `why_not_attention` in kernels/reference/attention.py says.
void require_heads(const Arguments& args, const Attention& p) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  if (p.d < 1) args.fail("d must be at least 1, got 0");
  if (p.g > 0 ? p.h % p.g != 0 : p.h > 0)
    args.fail("the heads of k and v must divide those of q, " + text(p.h) + ", got " + text(p.g));
}

void require_mask(const Arguments& args, const Attention& p, const Tensor& mask) {
  if (p.causal) args.fail("mask and is_causal exclude each other; take both into the mask");
  const int64_t wanted[] = {p.b, p.h, p.m, p.n};
  bool good = mask.dim() == 4;
  for (int axis = 0; good && axis < 4; ++axis)
    good = mask.size(axis) == 1 || mask.size(axis) == wanted[axis];
  if (good) return;
  std::string want, got;
  for (const int64_t size : wanted) want += (want.empty() ? "" : ", ") + std::to_string(size);
  for (int64_t axis = 0; axis < mask.dim(); ++axis)
    got += (got.empty() ? "" : ", ") + std::to_string(mask.size(axis));
  args.fail("mask must be [" + want + "], or 1 along some of its axes, got [" + got + "]");
}

// As it lies, if its last axis is dense, else a copy.
Rows rows_of(Arguments& args, const Tensor& t) {
  const int64_t columns = t.size(3);
  if (columns == 1 || t.stride(3) == 1)
    return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  return {args.data(t), t.size(1) * t.size(2) * columns, t.size(2) * columns, columns};
}

void set_mask(Arguments& args, Attention& p, const Tensor& mask) {
  p.mask = rows_of(args, mask);
  // A size of 1, or an axis that was expanded.
  int64_t* const strides[] = {&p.mask.batch, &p.mask.head, &p.mask.row};
  for (int axis = 0; axis < 3; ++axis) {
    if (mask.size(axis) == 1) *strides[axis] = 0;
  }
  p.mask_key = mask.size(3) == 1 ? 0 : 1;
  p.mask_is_bool = mask.scalar_type() == ScalarType::Bool;
  if (!p.mask_is_bool) p.mask_dtype = float_format(mask);
}

// Heads of keys go to threads whole where that shares the work evenly, or nearly so: what is packed
// stays in a core's cache. Else all are packed first, and then rows are shared.
void run(const Arguments& args, const Attention& p, const AttentionKernel& kernel) {
  constexpr int64_t kProducts = 1 << 20, kRows = 48, kTurns = 4;
  const int64_t heads = p.b * p.g, products = p.n * (p.m * p.each() + 4) * (p.d + p.e);
  const int parts = qnn::parts_of(heads * products / kProducts);
  const size_t bytes = kernel.head_bytes(p), scratch = kernel.scratch_bytes(p);
  const auto rows = [&](int64_t head_of_keys, int64_t first, int64_t count, const char* packed,
                        char* memory) {
    for (int64_t i = 0; i < p.each(); ++i)
      kernel.rows(p, head_of_keys * p.each() + i, first, count, packed, memory);
  };
  if (parts == 1 || heads % parts == 0 || heads >= kTurns * parts) {
    return share(parts, [&](int part, int) {
      char* memory = scratch_of_this_thread(bytes + scratch);
      for (int64_t head = part; head < heads; head += parts) {
        kernel.pack(p, head, memory, memory + bytes);
        rows(head, 0, p.m, memory, memory + bytes);
      }
    });
  }
  const Tensor all = args.empty({heads * static_cast<int64_t>(bytes)}, ScalarType::Byte);
  auto* packed = static_cast<char*>(all.data_ptr());
  share(parts, [&](int part, int) {
    char* memory = scratch_of_this_thread(scratch);
    for (int64_t head = part; head < heads; head += parts)
      kernel.pack(p, head, packed + head * bytes, memory);
  });
  const int64_t blocks = div_up(p.m, kRows);
  share(parts, [&](int part, int) {
    char* memory = scratch_of_this_thread(scratch);
    for (int64_t block = part; block < heads * blocks; block += parts) {
      const int64_t head = block / blocks, first = block % blocks * kRows;
      rows(head, first, std::min(kRows, p.m - first), packed + head * bytes, memory);
    }
  });
}

Tensor attend(const Tier& tier, const Tensor& q, const Tensor& k, const Tensor& v,
              const Maybe& mask, const std::optional<double>& scale, bool is_causal) {
  static const Signature& signature = signature_of("int8_attention");
  Arguments args(signature, q, k, v, mask, scale, is_causal);
  Attention p{};
  p.b = q.size(0), p.h = q.size(1), p.m = q.size(2), p.d = q.size(3);
  p.g = k.size(1), p.n = k.size(2), p.e = v.size(3);
  p.causal = is_causal;
  require_heads(args, p);
  if (mask.has_value()) require_mask(args, p, *mask);
  Tensor y = args.empty({p.b, p.m, p.h, p.e}, q.scalar_type());
  p.y = y.data_ptr();
  if (y.numel() == 0) return y;
  if (p.n == 0) return torch::stable::zero_(y);
  if (p.causal) p.n = std::min(p.n, p.m);  // no query sees those after them
  p.dtype = float_format(q);
  p.q = rows_of(args, q), p.k = rows_of(args, k), p.v = rows_of(args, v);
  if (mask.has_value()) set_mask(args, p, *mask);
  const double factor = scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(p.d));
  p.unit = static_cast<float>(factor) * 1.44269504f * 1024.0f;
  with_memory(args, [&] { run(args, p, tier.attention); });
  return y;
}

Tensor int8_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask,
                      std::optional<double> scale, bool is_causal) {
  return attend(best_tier(), q, k, v, mask, scale, is_causal);
}

// For tests: in the named tier.
Tensor cpu_attention(Tensor q, Tensor k, Tensor v, Maybe mask, std::optional<double> scale,
                     bool is_causal, std::string tier) {
  return attend(tier_called(tier), q, k, v, mask, scale, is_causal);
}

[[maybe_unused]] const bool added = add_ops({{"int8_attention", TORCH_BOX(&int8_attention)}});

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def(
      "cpu_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, bool is_causal, str "
      "tier) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) { m.impl("cpu_attention", TORCH_BOX(&qnn::cpu_attention)); }

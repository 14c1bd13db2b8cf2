// The ops of kernels/declare/attention.py on the CPU.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "attention/attention.h"
#include "ops/arguments.h"
#include "ops/attention_call.h"
#include "ops/threads.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

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
  p.unit = unit_of(scale, p.d);
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

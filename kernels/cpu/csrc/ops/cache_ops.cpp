// The ops over a cache of keys and values of kernels/declare/attention.py on the CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "attention/cache.h"
#include "ops/arguments.h"
#include "ops/attention_call.h"
#include "ops/threads.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

// What `why_not_lengths` in kernels/reference/attention.py says.
void require_lengths(const Arguments& args, const int64_t* length, int64_t stride, int64_t count,
                     int64_t least, int64_t most) {
  if (count == 0) return;
  int64_t low = length[0], high = length[0];
  for (int64_t i = 0; i < count; ++i)
    low = std::min(low, length[i * stride]), high = std::max(high, length[i * stride]);
  const auto text = [](int64_t number) { return std::to_string(number); };
  if (high > most || low < 0)
    args.fail("length must be from 0 to " + text(most) + ", the tokens that the cache holds, got " +
              text(high > most ? high : low));
  if (low < least)
    args.fail("with is_causal the last " + text(least) +
              " tokens are those of q: length must be at least " + text(least) + ", got " +
              text(low) + "; append their keys and values first");
}

// As they lie: a copy would not be what is written to.
CodeRows written_rows(const Arguments& args, const Tensor& codes, const Tensor& scales,
                      const char* name) {
  if ((codes.size(3) > 1 && codes.stride(3) != 1) || (scales.size(2) > 1 && scales.stride(2) != 1))
    args.fail(std::string(name) +
              " must be dense along the last axis, and its scales too, as a cache is made");
  return {
      static_cast<int8_t*>(codes.data_ptr()), codes.stride(0),  codes.stride(1), codes.stride(2),
      static_cast<float*>(scales.data_ptr()), scales.stride(0), scales.stride(1)};
}

// As they lie, or a copy where they are not dense along the last axis.
CodeRows read_rows(Arguments& args, const Tensor& codes, const Tensor& scales) {
  const Rows rows = rows_of(args, codes);
  CodeRows found{};
  found.codes = static_cast<int8_t*>(const_cast<void*>(rows.values));
  found.batch = rows.batch, found.head = rows.head, found.row = rows.row;
  const int64_t places = scales.size(2);
  if (places <= 1 || scales.stride(2) == 1) {
    found.scales = static_cast<float*>(scales.data_ptr());
    found.scale_batch = scales.stride(0), found.scale_head = scales.stride(1);
  } else {
    found.scales = const_cast<float*>(args.data<float>(scales));
    found.scale_batch = scales.size(1) * places, found.scale_head = places;
  }
  return found;
}

// What a thread should have to do at least.
constexpr int64_t kBytesOfThread = 1 << 17;

void append(const Tier& tier, const Tensor& k, const Tensor& v, const Tensor& keys,
            const Tensor& key_scale, const Tensor& values, const Tensor& value_scale,
            const Tensor& length) {
  static const Signature& signature = signature_of("int8_kv_append");
  Arguments args(signature, k, v, keys, key_scale, values, value_scale, length);
  CacheAppend p{};
  p.b = k.size(0), p.g = k.size(1), p.n = k.size(2), p.d = k.size(3), p.e = v.size(3);
  p.dtype = float_format(k);
  auto* held = static_cast<int64_t*>(length.data_ptr());
  p.length = held, p.length_stride = length.stride(0);
  const int64_t most = keys.size(2);
  require_lengths(args, held, p.length_stride, p.b, 0, most);
  for (int64_t i = 0; i < p.b; ++i) {
    const int64_t there = held[i * p.length_stride];
    if (there + p.n > most) {
      int64_t least = 0;
      for (int64_t j = 0; j < p.b; ++j) least = std::max(least, held[j * p.length_stride]);
      args.fail("the cache holds " + std::to_string(most) + " tokens at most: there are " +
                std::to_string(least) + ", and " + std::to_string(p.n) +
                " more; make it larger, or reset it");
    }
  }
  p.keys = written_rows(args, keys, key_scale, "keys");
  p.values = written_rows(args, values, value_scale, "values");
  if (p.b > 1 && p.length_stride == 0)
    args.fail("length is one number for all sequences (expand); it is written, so make it dense");
  if (p.b * p.n == 0) return;
  if (p.g > 0) {
    p.k = rows_of(args, k), p.v = rows_of(args, v);
    with_memory(args, [&] {
      const int64_t heads = p.b * p.g, bytes = heads * p.n * (p.d + p.e) * 4;
      const int parts =
          static_cast<int>(std::min<int64_t>(qnn::parts_of(bytes / kBytesOfThread), heads));
      share(parts, [&](int part, int) {
        char* memory = scratch_of_this_thread(tier.cache.append_bytes(p));
        for (int64_t head = part; head < heads; head += parts) tier.cache.append(p, head, memory);
      });
    });
  }
  for (int64_t i = 0; i < p.b; ++i) held[i * p.length_stride] += p.n;
}

void run(const Arguments& args, const CachedAttention& p, const CacheKernel& kernel) {
  const Attention& call = p.call;
  const CacheBlocks blocks(call);
  int64_t tokens = 0;
  for (int64_t i = 0; i < call.b; ++i) tokens += p.tokens(i);
  // A key is read once for the rows of a block, and multiplied for each.
  const int64_t bytes = tokens * call.g * (call.d + call.e),
                work = bytes * (1 + call.m * call.each() / 8);
  const int parts =
      static_cast<int>(std::min<int64_t>(qnn::parts_of(work / kBytesOfThread), blocks.count));
  const size_t scratch = kernel.scratch_bytes(p);
  Tensor all;
  char* gains = nullptr;
  if (call.m > 1 && call.mask.values != nullptr) {
    const auto each = static_cast<int64_t>(kernel.gain_bytes(p));
    const int64_t heads = call.b * (p.gain_each() ? call.h : call.g);
    all = args.empty({heads * each}, ScalarType::Byte);
    gains = static_cast<char*>(all.data_ptr());
    share(parts, [&](int part, int) {
      char* memory = scratch_of_this_thread(scratch);
      for (int64_t head = part; head < heads; head += parts)
        kernel.gains(p, head, gains + head * each, memory);
    });
  }
  share(parts, [&](int part, int) {
    char* memory = scratch_of_this_thread(scratch);
    for (int64_t block = part; block < blocks.count; block += parts)
      kernel.rows(p, block, gains, memory);
  });
}

Tensor attend(const Tier& tier, const Tensor& q, const Tensor& keys, const Tensor& key_scale,
              const Tensor& values, const Tensor& value_scale, const Tensor& length,
              const Maybe& mask, const std::optional<double>& scale, bool is_causal) {
  static const Signature& signature = signature_of("int8_kv_attention");
  Arguments args(signature, q, keys, key_scale, values, value_scale, length, mask, scale,
                 is_causal);
  CachedAttention p{};
  Attention& call = p.call;
  call.b = q.size(0), call.h = q.size(1), call.m = q.size(2), call.d = q.size(3);
  call.g = keys.size(1), call.n = keys.size(2), call.e = values.size(3);
  call.causal = is_causal;
  require_heads(args, call);
  if (mask.has_value()) require_mask(args, call, *mask);
  p.length = static_cast<const int64_t*>(length.data_ptr()), p.length_stride = length.stride(0);
  require_lengths(args, p.length, p.length_stride, call.b, is_causal ? call.m : 0, call.n);
  Tensor y = args.empty({call.b, call.m, call.h, call.e}, q.scalar_type());
  call.y = y.data_ptr();
  if (y.numel() == 0) return y;
  if (call.n == 0) return torch::stable::zero_(y);
  call.dtype = float_format(q);
  call.q = rows_of(args, q);
  p.keys = read_rows(args, keys, key_scale), p.values = read_rows(args, values, value_scale);
  if (mask.has_value()) set_mask(args, call, *mask);
  call.unit = unit_of(scale, call.d);
  with_memory(args, [&] { run(args, p, tier.cache); });
  return y;
}

Tensor int8_kv_attention(const Tensor& q, const Tensor& keys, const Tensor& key_scale,
                         const Tensor& values, const Tensor& value_scale, const Tensor& length,
                         const Maybe& mask, std::optional<double> scale, bool is_causal) {
  return attend(best_tier(), q, keys, key_scale, values, value_scale, length, mask, scale,
                is_causal);
}

void int8_kv_append(const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& key_scale,
                    const Tensor& values, const Tensor& value_scale, const Tensor& length) {
  append(best_tier(), k, v, keys, key_scale, values, value_scale, length);
}

// For tests: in the named tier.
Tensor cpu_kv_attention(Tensor q, Tensor keys, Tensor key_scale, Tensor values, Tensor value_scale,
                        Tensor length, Maybe mask, std::optional<double> scale, bool is_causal,
                        std::string tier) {
  return attend(tier_called(tier), q, keys, key_scale, values, value_scale, length, mask, scale,
                is_causal);
}

void cpu_kv_append(Tensor k, Tensor v, Tensor keys, Tensor key_scale, Tensor values,
                   Tensor value_scale, Tensor length, std::string tier) {
  append(tier_called(tier), k, v, keys, key_scale, values, value_scale, length);
}

[[maybe_unused]] const bool added = add_ops({
    {"int8_kv_append", TORCH_BOX(&int8_kv_append)},
    {"int8_kv_attention", TORCH_BOX(&int8_kv_attention)},
});

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def(
      "cpu_kv_attention(Tensor q, Tensor keys, Tensor key_scale, Tensor values, Tensor "
      "value_scale, "
      "Tensor length, Tensor? mask, float? scale, bool is_causal, str tier) -> Tensor");
  m.def(
      "cpu_kv_append(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) key_scale, Tensor(c!) values, "
      "Tensor(d!) value_scale, Tensor(e!) length, str tier) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) {
  m.impl("cpu_kv_attention", TORCH_BOX(&qnn::cpu_kv_attention));
  m.impl("cpu_kv_append", TORCH_BOX(&qnn::cpu_kv_append));
}

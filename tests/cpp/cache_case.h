// The calls of attention_case.h over a cache that their keys and values were appended to.
#pragma once

namespace {

// A causal call counts queries from the first key, and a cache from the last token: it holds as
// many tokens as there are queries then.
bool is_of_a_cache(const AttentionCase& c) { return !c.causal || c.n >= c.m; }

void run_cache(const Tier& tier, const AttentionCase& c, char* y) {
  Operands operands(c.at_end);
  const qnn::CacheKernel& kernel = tier.cache;
  const int64_t tokens = c.causal ? c.m : c.n,
                places = c.n + (c.masked ? 0 : static_cast<int64_t>(c.seed % 3) * 40);
  const auto placed = [&](const std::vector<double>& x, Rows rows) {
    rows.values = operands.place_floats({x.begin(), x.end() - c.gap}, c.dtype);
    return rows;
  };
  // Rows end where the memory does.
  std::vector<std::unique_ptr<Memory>> held;
  const auto memory = [&](size_t bytes) {
    held.push_back(std::make_unique<Memory>(bytes, c.at_end, 0xff));
    return held.back()->data();
  };
  const auto rows_of_cache = [&](int64_t columns) {
    const int64_t row = columns + c.gap, all = c.b * c.g * places;
    auto* codes = reinterpret_cast<int8_t*>(memory(all * row - c.gap));
    auto* scales = reinterpret_cast<float*>(memory(all * sizeof(float)));
    return qnn::CodeRows{codes,  c.g * places * row, places * row, row,
                         scales, c.g * places,       places};
  };
  qnn::CachedAttention p{};
  p.keys = rows_of_cache(c.d), p.values = rows_of_cache(c.e);
  const auto on_parts = [&](int64_t count, size_t bytes, const auto& work) {
    std::vector<std::thread> threads;
    for (int part = 0; part < c.parts; ++part) {
      char* scratch = memory(bytes);
      const auto all = [&work, &c, count, part, scratch] {
        for (int64_t i = part; i < count; i += c.parts) work(i, scratch);
      };
      if (c.parts == 1) return all();
      threads.emplace_back(all);
    }
    for (std::thread& thread : threads) thread.join();
  };
  const Rows k = placed(c.k, c.rows(c.g, c.n, c.d)), v = placed(c.v, c.rows(c.g, c.n, c.e));
  const int64_t first = tokens / 3;
  for (const bool rest : {false, true}) {
    const int64_t begin = rest ? first : 0;
    qnn::CacheAppend a{};
    a.b = c.b, a.g = c.g, a.n = rest ? tokens - first : first, a.d = c.d, a.e = c.e;
    a.dtype = c.dtype, a.k = k, a.v = v, a.keys = p.keys, a.values = p.values;
    const size_t size = format_of(c.dtype).bytes;
    a.k.values = static_cast<const char*>(k.values) + begin * k.row * size;
    a.v.values = static_cast<const char*>(v.values) + begin * v.row * size;
    a.length = &begin, a.length_stride = 0;
    on_parts(c.b * c.g, kernel.append_bytes(a),
             [&](int64_t head, char* scratch) { kernel.append(a, head, scratch); });
  }
  for (int i = 0; i < 4; ++i) held[i]->make_read_only();
  p.length = &tokens, p.length_stride = 0;
  Attention& call = p.call;
  call.b = c.b, call.h = c.h, call.g = c.g, call.m = c.m, call.n = places, call.d = c.d;
  call.e = c.e, call.dtype = c.dtype, call.unit = c.unit, call.causal = c.causal, call.y = y;
  call.q = placed(c.q, c.rows(c.h, c.m, c.d));
  if (c.masked) {
    call.mask = c.mask_rows(), call.mask_is_bool = c.mask_is_bool, call.mask_dtype = c.mask_dtype;
    call.mask_key = c.mask_sizes[3] == 1 ? 0 : 1;
    const std::vector<char> seen(c.mask.begin(), c.mask_is_bool ? c.mask.end() : c.mask.begin());
    call.mask.values = c.mask_is_bool ? operands.place(seen.data(), seen.size())
                                      : operands.place_floats(c.mask, c.mask_dtype);
  }
  const size_t bytes = kernel.scratch_bytes(p), each = kernel.gain_bytes(p);
  char* gains = nullptr;
  if (c.m > 1 && c.masked) {
    const int64_t heads = c.b * (p.gain_each() ? c.h : c.g);
    gains = memory(heads * each);
    on_parts(heads, bytes, [&](int64_t head, char* scratch) {
      kernel.gains(p, head, gains + head * each, scratch);
    });
  }
  on_parts(qnn::CacheBlocks(call).count, bytes,
           [&](int64_t block, char* scratch) { kernel.rows(p, block, gains, scratch); });
}

bool passes_by_a_cache(const Tier& tier, const AttentionCase& c, const std::vector<Bounds>& want) {
  if (!is_of_a_cache(c)) return true;
  std::snprintf(running, sizeof running, "%s: by a cache, %s", tier.name, c.text().c_str());
  return passes(want, c.dtype, c.at_end, c.e, [&](char* y) { run_cache(tier, c, y); });
}

}  // namespace

// The ops of kernels/int8.py, and those of kernels/float_ops.py over a float weight, on the CPU,
// registered through torch's stable interface, and the
// choice of the tier. The only file here that knows torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tiers.h"

namespace qnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// -- tiers
// -------------------------------------------------------------------------------------------------------------

const Tier* const kTiers[] = {
#if defined(__x86_64__)
#ifndef QNN_NO_AMX
    &amx,
#endif
#ifndef QNN_NO_AVX512_VNNI
    &avx512_vnni,
#endif
#ifndef QNN_NO_AVX_VNNI
    &avx_vnni,
#endif
#ifndef QNN_NO_AVX2
    &avx2,
#endif
#endif
    &portable,
};

void run_alone(const Kernel& kernel, const Linear& p) {
  const size_t bytes = kernel.scratch_bytes(p);
  std::vector<char> scratch(bytes + 64);
  void* aligned = scratch.data();
  size_t space = scratch.size();
  kernel.run(p, 0, 1, static_cast<char*>(std::align(64, bytes, aligned, space)));
}

// Full-range operands whose product plain loops know, in both forms of the kernel.
bool known_integers(const Tier& tier) {
  for (const auto& [m, k, n] : {std::array<int64_t, 3>{3, 301, 50}, {40, 1100, 33}}) {
    std::vector<int8_t> x(m * k), w(n * k);
    uint32_t state = 1;
    const auto next = [&] {
      return static_cast<int>((state = state * 1664525 + 1013904223) >> 24);
    };
    for (auto& v : x) v = static_cast<int8_t>(std::max(next() - 128, -127));
    for (auto& v : w) v = static_cast<int8_t>(next() - 128);
    std::fill_n(x.begin(), k, int8_t{127});
    std::fill_n(w.begin(), k, int8_t{127});
    std::fill_n(w.end() - k, k, int8_t{-128});
    const std::vector<float> ones(std::max(m, n), 1.0f);
    std::vector<float> y(m * n);
    Linear p{};
    p.m = m, p.k = k, p.n = n;
    p.x = x.data(), p.row_scale = ones.data();
    p.w = w.data(), p.w_stride = k, p.sw = ones.data();
    p.y = y.data();
    run_alone(tier.int8, p);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        int32_t sum = 0;
        for (int64_t l = 0; l < k; ++l) sum += x[i * k + l] * w[j * k + l];
        if (y[i * n + j] != static_cast<float>(sum)) return false;
      }
    }
  }
  return true;
}

double value_of_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = (code & 127) == 127 ? std::nan("")
                           : exponent == 0     ? std::ldexp(mantissa, -9)
                                               : std::ldexp(8 + mantissa, exponent - 10);
  return code & 128 ? -magnitude : magnitude;
}

double value_of_e2m1(int code) {
  const double magnitude =
      (code & 7) < 2 ? 0.5 * (code & 7) : std::ldexp(2 + (code & 1), (code >> 1 & 3) - 2);
  return code & 8 ? -magnitude : magnitude;
}

// All codes of both float formats, in both forms of the kernel. Two rows of w hold a NaN; the other
// sums may err by the order of their terms. 1 ms a tier, when the library is loaded.
bool known_floats(const Tier& tier) {
  for (const auto& [m, k, n] : {std::array<int64_t, 3>{3, 301, 20}, {20, 560, 9}}) {
    for (const Weight weight : {Weight::e4m3, Weight::e2m1}) {
      const bool packed = weight == Weight::e2m1;
      const int64_t blocks = div_up(k, 16), stride = packed ? blocks * 8 : k;
      std::vector<float> x(m * k), y(m * n);
      std::vector<uint8_t> w(n * stride), scales(n * blocks);
      uint32_t state = 1;
      const auto next = [&] {
        return static_cast<uint8_t>((state = state * 1664525 + 1013904223) >> 24);
      };
      for (auto& v : x) v = static_cast<float>(next() - 128) / 64;
      for (auto* codes : {&w, &scales}) {
        const bool e4m3 = codes == &scales || !packed;
        for (auto& v : *codes) {
          do {
            v = next();
          } while (e4m3 && (v & 127) == 127);
        }
      }
      auto& holds_nan = packed ? scales : w;
      holds_nan.front() = 127;
      holds_nan.back() = 255;
      const std::vector<float> ones(n, 1.0f);
      Linear p{};
      p.m = m, p.k = k, p.n = n;
      p.x = x.data();
      p.weight = weight, p.w = reinterpret_cast<const int8_t*>(w.data()), p.w_stride = stride;
      p.block_scale = scales.data(), p.sw = ones.data();
      p.y = y.data();
      run_alone(tier.weight_only, p);
      for (int64_t j = 0; j < n; ++j) {
        std::vector<double> values(k);
        for (int64_t l = 0; l < k; ++l) {
          values[l] = packed ? value_of_e2m1(w[j * stride + l / 2] >> 4 * (l % 2) & 15) *
                                   value_of_e4m3(scales[j * blocks + l / 16])
                             : value_of_e4m3(w[j * stride + l]);
        }
        for (int64_t i = 0; i < m; ++i) {
          double sum = 0, size = 0;
          for (int64_t l = 0; l < k; ++l) {
            sum += x[i * k + l] * values[l];
            size += std::fabs(x[i * k + l] * values[l]);
          }
          const float got = y[i * n + j];
          if (std::isnan(sum) ? !std::isnan(got) : !(std::fabs(got - sum) <= 1e-5 * size))
            return false;
        }
      }
    }
  }
  return true;
}

// Why a tier may not be used, or null; tried once a process.
const char* why_not(size_t index) {
  static const auto reasons = [] {
    std::array<const char*, std::size(kTiers)> found{};
    for (size_t i = 0; i < std::size(kTiers); ++i) {
      found[i] = !kTiers[i]->runs_here()       ? "this CPU lacks the instructions"
                 : !known_integers(*kTiers[i]) ? "wrong integers in the known-answer test"
                 : !known_floats(*kTiers[i])   ? "wrong floats in the known-answer test"
                                               : nullptr;
    }
    return found;
  }();
  return reasons[index];
}

const Tier& best_tier() {
  static const Tier& best = []() -> const Tier& {
    for (size_t i = 0; i < std::size(kTiers); ++i) {
      if (why_not(i) == nullptr) return *kTiers[i];
    }
    throw std::runtime_error("qnn: no kernel gives right results on this CPU.");
  }();
  return best;
}

const Tier& tier_called(const std::string& name) {
  for (size_t i = 0; i < std::size(kTiers); ++i) {
    if (name != kTiers[i]->name) continue;
    if (why_not(i) != nullptr)
      throw std::invalid_argument("qnn: tier '" + name + "' cannot run: " + why_not(i) + ".");
    return *kTiers[i];
  }
  throw std::invalid_argument("qnn: unknown tier '" + name + "'.");
}

std::string cpu_tiers() {
  std::string text;
  for (size_t i = 0; i < std::size(kTiers); ++i) {
    const char* reason = why_not(i);
    text += std::string(i == 0 ? "" : ",") + kTiers[i]->name + ":" +
            (reason == nullptr ? "ok" : reason);
  }
  return text;
}

// -- threads and memory
// ------------------------------------------------------------------------------------------------

// Memory of a thread, kept between its calls up to kKept bytes.
char* scratch_of_this_thread(size_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local size_t size = 0;
  constexpr size_t kKept = size_t{8} << 20;
  if (size < bytes || (size > kKept && bytes <= kKept)) {
    memory.reset();
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, size)));
    if (memory == nullptr) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

// `work(part, parts)` on torch's threads: all of them at most, and no more than the work is worth.
template <class Work>
void share(int64_t worth, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  const int parts = static_cast<int>(std::clamp<int64_t>(worth, 1, std::max<int64_t>(threads, 1)));
  if (parts == 1) return work(0, 1);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) work(static_cast<int>(part), parts);
  });
}

void run_parallel(const Kernel& kernel, const Linear& p) {
  // A thread more is worth its start, some µs, from about so many products, or so many bytes of w,
  // to each.
  constexpr int64_t kProducts = 1 << 20, kBytes = 1 << 17;
  const int64_t worth = std::max(p.m * p.n * p.k / kProducts, p.n * p.k / kBytes);
  const size_t bytes = kernel.scratch_bytes(p);
  share(worth,
        [&](int part, int parts) { kernel.run(p, part, parts, scratch_of_this_thread(bytes)); });
}

// -- arguments
// ---------------------------------------------------------------------------------------------------------

constexpr const char* kActivations[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};

std::optional<DType> float_format(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Double:
      return DType::float64;
    default:
      return std::nullopt;
  }
}

std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "dtype" + std::to_string(static_cast<int>(dtype));
  }
}

std::string sizes_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  return text + "]";
}

// The arguments of a call by name, to check them and to repeat them in an error, as Op.check does
// in kernels/spec.py. (There a wrong dtype is a TypeError; torch lets C++ raise a ValueError only.)
class Arguments {
 public:
  Arguments(const char* op, std::vector<std::pair<const char*, const Tensor*>> tensors,
            std::string rest = "")
      : op_(op), tensors_(std::move(tensors)), rest_(std::move(rest)) {}

  [[noreturn]] void fail(const std::string& reason) const {
    std::string text = std::string("qnn::") + op_ + "(";
    const char* comma = "";
    for (const auto& [name, t] : tensors_) {
      text += std::string(comma) + name + "=" + name_of(t->scalar_type()) + sizes_of(*t);
      comma = ", ";
    }
    throw std::invalid_argument(text + rest_ + "): " + reason + ".");
  }

  // The sizes of argument `i` are `wanted`, which `rule` describes.
  void shape(size_t i, bool fits, const char* rule) const {
    if (!fits)
      fail(std::string(tensors_[i].first) + " must be " + rule + ", got " +
           sizes_of(*tensors_[i].second));
  }

  // As above where one size, `axis`, is fixed by an earlier argument.
  void shape(size_t i, bool fits, const char* rule, const char* axis, int64_t size,
             const char* source) const {
    if (fits) return;
    const std::string given =
        std::string(" with ") + axis + " = " + std::to_string(size) + " as in " + source;
    shape(i, false, (rule + given).c_str());
  }

  void dtype(size_t i, ScalarType wanted) const {
    if (tensors_[i].second->scalar_type() != wanted) {
      fail(std::string(tensors_[i].first) + " must be one of torch." + name_of(wanted));
    }
  }

  DType float_dtype(size_t i) const {
    const auto format = float_format(tensors_[i].second->scalar_type());
    if (!format.has_value()) {
      fail(std::string(tensors_[i].first) +
           " must be one of torch.float32, torch.bfloat16, torch.float16, torch.float64");
    }
    return *format;
  }

  // Argument `i`, row-major and dense.
  Tensor dense(size_t i) const {
    const Tensor& t = *tensors_[i].second;
    if (!t.is_cpu())
      fail(std::string(tensors_[i].first) +
           " is not on the CPU, where the first argument is; move them together");
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }

 private:
  const char* op_;
  std::vector<std::pair<const char*, const Tensor*>> tensors_;
  std::string rest_;
};

// The leading sizes of two tensors agree.
bool same_lead(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i + 1 < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  int32_t code;
  switch (dtype) {
    case ScalarType::Float:
      code = aoti_torch_dtype_float32();
      break;
    case ScalarType::BFloat16:
      code = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      code = aoti_torch_dtype_float16();
      break;
    case ScalarType::Double:
      code = aoti_torch_dtype_float64();
      break;
    default:
      code = aoti_torch_dtype_int8();
      break;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), code,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

struct Call {
  const char* op;
  bool weight_only;
  ScalarType dtype;         // of y
  const Tensor* row_scale;  // where the rows are codes
};

using Maybe = std::optional<Tensor>;

Tensor linear(const Call& call, const Tier& tier, const Tensor& x, const Tensor& w,
              const Tensor& sw, const Maybe& bias, const Maybe& residual,
              const std::string& activation) {
  const bool codes = call.row_scale != nullptr;
  const char* first = codes ? "q" : "x";
  std::vector<std::pair<const char*, const Tensor*>> tensors{{first, &x}};
  const auto add = [&](const char* name, const Tensor* t) {
    tensors.emplace_back(name, t);
    return tensors.size() - 1;
  };
  const size_t at_scale = codes ? add("scale", call.row_scale) : 0, at_w = add("w", &w),
               at_sw = add("sw", &sw);
  const size_t at_bias = bias.has_value() ? add("bias", &*bias) : 0;
  const size_t at_residual = residual.has_value() ? add("residual", &*residual) : 0;
  const Arguments args(call.op, std::move(tensors),
                       activation == "none" ? "" : ", activation='" + activation + "'");

  Linear p{};
  // Which dtypes, then which sizes, in the order of the arguments.
  if (codes) {
    args.dtype(0, ScalarType::Char);
  } else {
    p.x_dtype = args.float_dtype(0);
  }
  args.shape(0, x.dim() >= 1, "[..., k]");
  const int64_t last = x.dim() - 1;
  p.k = x.size(last);
  if (codes) {
    args.dtype(at_scale, ScalarType::Float);
    args.shape(at_scale, same_lead(x, *call.row_scale) && call.row_scale->size(last) == 1,
               "[..., 1] with the leading sizes of q");
  }
  args.dtype(at_w, ScalarType::Char);
  args.shape(at_w, w.dim() == 2, "[n, k]");
  args.shape(at_w, w.size(1) == p.k, "[n, k]", "k", p.k, first);
  p.n = w.size(0);
  args.dtype(at_sw, ScalarType::Float);
  args.shape(at_sw, sw.dim() == 2 && sw.size(1) == 1, "[n, 1]");
  args.shape(at_sw, sw.size(0) == p.n, "[n, 1]", "n", p.n, "w");
  if (bias.has_value()) {
    p.bias_dtype = args.float_dtype(at_bias);
    args.shape(at_bias, bias->dim() == 1, "[n]");
    args.shape(at_bias, bias->size(0) == p.n, "[n]", "n", p.n, "w");
  }
  const auto y_dtype = float_format(call.dtype);
  if (!y_dtype.has_value())
    args.fail("dtype must be one of torch.float32, torch.bfloat16, torch.float16, torch.float64");
  p.y_dtype = *y_dtype;
  if (residual.has_value()) {
    args.dtype(at_residual, call.dtype);
    args.shape(at_residual, same_lead(x, *residual),
               "[..., n] with the leading sizes of the first argument");
    args.shape(at_residual, residual->size(last) == p.n, "[..., n]", "n", p.n, "w");
  }
  const auto named = std::find(std::begin(kActivations), std::end(kActivations), activation);
  if (named == std::end(kActivations))
    args.fail("activation must be one of 'none', 'relu', 'gelu', 'gelu_tanh', 'silu'");
  p.activation = static_cast<Activation>(named - std::begin(kActivations));

  // Dense operands, alive until the end of the call.
  const Tensor dense_x = args.dense(0), dense_w = args.dense(at_w), dense_sw = args.dense(at_sw);
  const Tensor dense_scale = codes ? args.dense(at_scale) : dense_x,
               dense_bias = bias.has_value() ? args.dense(at_bias) : dense_x;
  const Tensor dense_residual = residual.has_value() ? args.dense(at_residual) : dense_x;
  p.m = 1;
  std::vector<int64_t> sizes(x.dim(), p.n);
  for (int64_t i = 0; i < last; ++i) p.m *= sizes[i] = x.size(i);
  Tensor y = empty(sizes, call.dtype);
  if (p.m == 0 || p.n == 0) return y;
  p.x = dense_x.data_ptr(), p.w = static_cast<const int8_t*>(dense_w.data_ptr()),
  p.y = y.data_ptr();
  p.w_stride = p.k;
  p.sw = static_cast<const float*>(dense_sw.data_ptr());
  if (codes) p.row_scale = static_cast<const float*>(dense_scale.data_ptr());
  if (bias.has_value()) p.bias = dense_bias.data_ptr();
  if (residual.has_value()) p.residual = dense_residual.data_ptr();
  run_parallel(call.weight_only ? tier.weight_only : tier.int8, p);
  return y;
}

// The layers over a float weight: of e4m3 with a scale a row, or, where `gw` is given, of e2m1 with
// a scale a block and one divisor.
Tensor float_weight_linear(const char* op, const Tier& tier, const Tensor& x, const Tensor& wq,
                           const Tensor& sw, const Tensor* gw, const Maybe& bias) {
  std::vector<std::pair<const char*, const Tensor*>> tensors{{"x", &x}, {"wq", &wq}, {"sw", &sw}};
  if (gw != nullptr) tensors.emplace_back("gw", gw);
  if (bias.has_value()) tensors.emplace_back("bias", &*bias);
  const size_t at_bias = tensors.size() - 1;
  const Arguments args(op, std::move(tensors));

  Linear p{};
  p.x_dtype = p.y_dtype = args.float_dtype(0);
  args.shape(0, x.dim() >= 1, "[..., k]");
  const int64_t last = x.dim() - 1;
  p.k = x.size(last);
  if (gw == nullptr) {
    p.weight = Weight::e4m3, p.w_stride = p.k;
    args.dtype(1, ScalarType::Float8_e4m3fn);
    args.shape(1, wq.dim() == 2, "[n, k]");
    args.shape(1, wq.size(1) == p.k, "[n, k]", "k", p.k, "x");
    p.n = wq.size(0);
    args.dtype(2, ScalarType::Float);
    args.shape(2, sw.dim() == 2 && sw.size(1) == 1, "[n, 1]");
    args.shape(2, sw.size(0) == p.n, "[n, 1]", "n", p.n, "wq");
  } else {
    const int64_t blocks = div_up(p.k, 16);
    p.weight = Weight::e2m1, p.w_stride = blocks * 8;
    args.dtype(1, ScalarType::Byte);
    args.shape(1, wq.dim() == 2, "[n, k/16*8]");
    args.shape(1, wq.size(1) == p.w_stride, "[n, k/16*8]", "k/16*8", p.w_stride, "x");
    p.n = wq.size(0);
    args.dtype(2, ScalarType::Float8_e4m3fn);
    args.shape(2, sw.dim() == 2, "[n, k/16]");
    args.shape(2, sw.size(0) == p.n, "[n, k/16]", "n", p.n, "wq");
    args.shape(2, sw.size(1) == blocks, "[n, k/16]", "k/16", blocks, "x");
    args.dtype(3, ScalarType::Float);
    args.shape(3, gw->dim() == 1 && gw->size(0) == 1, "[1]");
  }
  if (bias.has_value()) {
    p.bias_dtype = args.float_dtype(at_bias);
    args.shape(at_bias, bias->dim() == 1, "[n]");
    args.shape(at_bias, bias->size(0) == p.n, "[n]", "n", p.n, "wq");
  }

  // Dense operands, alive until the end of the call.
  const Tensor dense_x = args.dense(0), dense_wq = args.dense(1), dense_sw = args.dense(2);
  const Tensor dense_gw = gw != nullptr ? args.dense(3) : dense_x,
               dense_bias = bias.has_value() ? args.dense(at_bias) : dense_x;
  p.m = 1;
  std::vector<int64_t> sizes(x.dim(), p.n);
  for (int64_t i = 0; i < last; ++i) p.m *= sizes[i] = x.size(i);
  Tensor y = empty(sizes, x.scalar_type());
  if (p.m == 0 || p.n == 0) return y;
  float scale = 1.0f;
  p.x = dense_x.data_ptr(), p.y = y.data_ptr();
  p.w = static_cast<const int8_t*>(dense_wq.data_ptr());
  if (gw == nullptr) {
    p.sw = static_cast<const float*>(dense_sw.data_ptr());
  } else {
    p.block_scale = static_cast<const uint8_t*>(dense_sw.data_ptr());
    scale = 1.0f / *static_cast<const float*>(dense_gw.data_ptr());
    p.sw = &scale;
  }
  if (bias.has_value()) p.bias = dense_bias.data_ptr();
  run_parallel(tier.weight_only, p);
  return y;
}

// -- ops
// ---------------------------------------------------------------------------------------------------------------

Tensor int8_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                   std::string activation) {
  return linear({"int8_linear", false, x.scalar_type(), nullptr}, best_tier(), x, w, sw, bias,
                residual, activation);
}

Tensor int8_weight_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                          std::string activation) {
  return linear({"int8_weight_linear", true, x.scalar_type(), nullptr}, best_tier(), x, w, sw, bias,
                residual, activation);
}

Tensor int8_rows_linear(Tensor q, Tensor scale, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                        std::string activation, ScalarType dtype) {
  return linear({"int8_rows_linear", false, dtype, &scale}, best_tier(), q, w, sw, bias, residual,
                activation);
}

Tensor fp8_weight_linear(Tensor x, Tensor wq, Tensor sw, Maybe bias) {
  return float_weight_linear("fp8_weight_linear", best_tier(), x, wq, sw, nullptr, bias);
}

Tensor nvfp4_weight_linear(Tensor x, Tensor wq, Tensor sw, Tensor gw, Maybe bias) {
  return float_weight_linear("nvfp4_weight_linear", best_tier(), x, wq, sw, &gw, bias);
}

std::tuple<Tensor, Tensor> int8_quantize(Tensor x) {
  const Arguments args("int8_quantize", {{"x", &x}});
  const DType dtype = args.float_dtype(0);
  args.shape(0, x.dim() >= 1, "[..., k]");
  const Tensor dense = args.dense(0);
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  const Tensor codes = empty(sizes, ScalarType::Char);
  const int64_t k = sizes.back();
  sizes.back() = 1;
  const Tensor scales = empty(sizes, ScalarType::Float);
  const Quantize p{scales.numel(),
                   k,
                   dense.data_ptr(),
                   dtype,
                   static_cast<int8_t*>(codes.data_ptr()),
                   static_cast<float*>(scales.data_ptr())};
  constexpr int64_t kValues =
      1 << 16;  // a thread more is worth its start from so many values to each
  share(p.m * k / kValues, [&](int part, int parts) { best_tier().quantize(p, part, parts); });
  return {codes, scales};
}

// For tests and benchmarks: `scheme` is int8 or int8_weight, and the tier is the named one.
Tensor cpu_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual, std::string activation,
                  std::string scheme, std::string tier) {
  const bool weight_only = scheme == "int8_weight";
  if (!weight_only && scheme != "int8") {
    throw std::invalid_argument(
        "qnn::cpu_linear: scheme must be one of 'int8', 'int8_weight', got '" + scheme + "'.");
  }
  return linear({"cpu_linear", weight_only, x.scalar_type(), nullptr}, tier_called(tier), x, w, sw,
                bias, residual, activation);
}

// The same for a float weight: of nvfp4 where `gw` is given, else of fp8.
Tensor cpu_float_linear(Tensor x, Tensor wq, Tensor sw, Maybe gw, Maybe bias, std::string tier) {
  return float_weight_linear("cpu_float_linear", tier_called(tier), x, wq, sw,
                             gw.has_value() ? &*gw : nullptr, bias);
}

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def("cpu_tiers() -> str");
  m.def(
      "cpu_linear(Tensor x, Tensor w, Tensor sw, Tensor? bias, Tensor? residual, str activation, "
      "str scheme, str tier) "
      "-> Tensor");
  m.def(
      "cpu_float_linear(Tensor x, Tensor wq, Tensor sw, Tensor? gw, Tensor? bias, str tier) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CompositeExplicitAutograd, m) {
  m.impl("cpu_tiers", TORCH_BOX(&qnn::cpu_tiers));
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) {
  m.impl("int8_quantize", TORCH_BOX(&qnn::int8_quantize));
  m.impl("int8_linear", TORCH_BOX(&qnn::int8_linear));
  m.impl("int8_weight_linear", TORCH_BOX(&qnn::int8_weight_linear));
  m.impl("int8_rows_linear", TORCH_BOX(&qnn::int8_rows_linear));
  m.impl("fp8_weight_linear", TORCH_BOX(&qnn::fp8_weight_linear));
  m.impl("nvfp4_weight_linear", TORCH_BOX(&qnn::nvfp4_weight_linear));
  m.impl("cpu_linear", TORCH_BOX(&qnn::cpu_linear));
  m.impl("cpu_float_linear", TORCH_BOX(&qnn::cpu_float_linear));
}

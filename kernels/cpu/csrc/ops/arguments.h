// What every op on the CPU does with its arguments: their checks, whose errors repeat the call, and
// tensors through torch's stable interface.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "linear/linear.h"

namespace qnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline std::optional<DType> float_format(ScalarType dtype) {
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

inline std::string name_of(ScalarType dtype) {
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

inline std::string sizes_of(const Tensor& t) {
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

  // int32 sums so many products of codes of at most `largest` and 128 exactly; as `limits` of Op.
  void int32_sum(const char* axis, int64_t size, int64_t largest) const {
    const int64_t limit = std::numeric_limits<int32_t>::max() / (largest * 128);
    if (size > limit)
      fail(std::string(axis) + " must be at most " + std::to_string(limit) +
           ", beyond which an int32 sum can overflow, got " + std::to_string(size) +
           "; use the scheme int8_weight");
  }

  [[noreturn]] void fail(const std::string& reason) const {
    throw std::invalid_argument(call() + ": " + reason + ".");
  }

  // The words of torch's own error, by which programs know that a smaller batch may do.
  [[noreturn]] void no_memory(double bytes, const std::string& what) const {
    const std::string size =
        bytes < 9e15 ? std::to_string(static_cast<int64_t>(bytes)) : "more than 9e15";
    throw std::runtime_error(call() +
                             ": DefaultCPUAllocator: can't allocate memory: you tried to "
                             "allocate " +
                             size + " bytes for " + what + ".");
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
    if (t.is_contiguous()) return t;
    try {
      return torch::stable::contiguous(t);
    } catch (const std::exception&) {  // whose words name this interface and not the reason
      const double each = static_cast<double>(t.element_size());
      no_memory(static_cast<double>(t.numel()) * each,
                std::string("a dense copy of ") + tensors_[i].first);
    }
  }

  // A new tensor.
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) const;

 private:
  // The call, as it can be repeated.
  std::string call() const {
    std::string text = std::string("qnn::") + op_ + "(";
    const char* comma = "";
    for (const auto& [name, t] : tensors_) {
      text += std::string(comma) + name + "=" + name_of(t->scalar_type()) + sizes_of(*t);
      comma = ", ";
    }
    return text + rest_ + ")";
  }

  const char* op_;
  std::vector<std::pair<const char*, const Tensor*>> tensors_;
  std::string rest_;
};

// An op's kernel, and that of the twin that an eager call without gradients goes to (Op.call).
inline void serve(torch::stable::detail::StableLibrary& m, const std::string& name,
                  void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
  m.impl(name.c_str(), kernel);
  m.impl((name + "_no_grad").c_str(), kernel);
}

// The leading sizes of two tensors agree.
inline bool same_lead(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i + 1 < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline Tensor Arguments::empty(const std::vector<int64_t>& sizes, ScalarType dtype) const {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  int32_t code;
  double bytes;
  switch (dtype) {
    case ScalarType::Float:
      code = aoti_torch_dtype_float32(), bytes = 4;
      break;
    case ScalarType::BFloat16:
      code = aoti_torch_dtype_bfloat16(), bytes = 2;
      break;
    case ScalarType::Half:
      code = aoti_torch_dtype_float16(), bytes = 2;
      break;
    case ScalarType::Double:
      code = aoti_torch_dtype_float64(), bytes = 8;
      break;
    default:
      code = aoti_torch_dtype_int8(), bytes = 1;
      break;
  }
  for (const int64_t size : sizes) bytes *= static_cast<double>(size);
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               code, aoti_torch_device_type_cpu(), 0, &handle) != 0)
    no_memory(bytes, "its result");
  return Tensor(handle);
}

}  // namespace qnn

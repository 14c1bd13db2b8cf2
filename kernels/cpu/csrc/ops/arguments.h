// What every op on the CPU does with its arguments: they are checked by the op's own declaration,
// which Python hands over (kernels/op), and errors repeat the call; and tensors through torch's
// stable interface.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "linear/linear.h"

namespace qnn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// An op's arguments as declared, parsed once.
struct Signature;

// That of an op, which is filled when the op is declared; the reference stays good.
const Signature& signature_of(const std::string& op);

// The kernels of this library by their ops, each of which `cpu_declare` puts in place.
struct NativeOp {
  const char* name;
  void (*kernel)(StableIValue*, uint64_t, uint64_t);
  bool checks_functions = false;  // it checks itself the axes that are functions of others
};
bool add_ops(std::initializer_list<NativeOp> ops);

// Of a dtype that FLOATS in kernels/formats/base.py has.
DType float_format(ScalarType dtype);
inline DType float_format(const Tensor& t) { return float_format(t.scalar_type()); }

// Of an image [b, c, i1, i2, i3]: whether the channels are the last axis in memory.
inline bool is_channels_last(const Tensor& t) {
  int64_t stride = 1;
  for (const int axis : {1, 4, 3, 2, 0}) {
    const int64_t size = t.size(axis);
    if (size != 1 && t.stride(axis) != stride) return false;
    stride *= size;
  }
  return true;
}

inline Activation activation_called(const std::string& name) {
  const auto* found = std::find(std::begin(kActivations), std::end(kActivations), name);
  return static_cast<Activation>(found - std::begin(kActivations));
}

// One argument of a call: a tensor, null where it was left out; a word; integers; a dtype; a flag,
// or a number, which may be left out.
// One that is given by a pointer is an argument of some ops only: of those, for whose calls
// it is not null.
struct Argument {
  Argument() = default;
  Argument(const Tensor& t) : tensor(&t) {}
  Argument(const Maybe& t) : tensor(t.has_value() ? &*t : nullptr) {}
  Argument(const std::string& s) : word(&s) {}
  Argument(const std::vector<int64_t>& list) : integers(list.data()), count(list.size()) {}
  Argument(const int64_t& integer) : integers(&integer) {}
  Argument(const bool& flag) : flag(flag) {}
  Argument(const std::optional<double>& number) : number(number) {}
  Argument(const Tensor* t) : tensor(t), exists(t != nullptr) {}
  Argument(const Maybe* t) : exists(t != nullptr) {
    if (exists && t->has_value()) tensor = &**t;
  }
  Argument(const ScalarType* d) : exists(d != nullptr) {
    if (exists) dtype = *d;
  }
  const Tensor* tensor = nullptr;
  const std::string* word = nullptr;
  const int64_t* integers = nullptr;
  size_t count = 0;  // of a list
  bool flag = false;
  std::optional<double> number;
  ScalarType dtype = ScalarType::Float;
  bool exists = true;
};

// The arguments of a call, which are as the op declares them; else the constructor throws the words
// of Op.check. (There a wrong dtype is a TypeError; torch lets C++ raise a ValueError only.)
class Arguments {
 public:
  template <class... Given>
  explicit Arguments(const Signature& signature, const Given&... given) : signature_(signature) {
    static_assert(sizeof...(given) <= kMost);
    const auto add = [&](const Argument& a) { a.exists ? void(all_[count_++] = a) : void(); };
    (add(Argument(given)), ...);
    check();
  }

  // Throws where an axis of an argument that is a function of others has not the wanted size, that
  // which it has by argument `source`.
  void require_axis(const Tensor& t, int64_t axis, int64_t wanted, size_t source = 0) const;
  // Throws, with the call repeated.
  [[noreturn]] void fail(const std::string& reason) const;
  // The words of torch's own error, by which programs know that a smaller batch may do.
  [[noreturn]] void no_memory(double bytes, const std::string& what) const;

  // The values of a tensor, row-major and dense, for as long as this lives; null where it was left
  // out.
  const void* data(const Tensor& t);
  const void* data(const Tensor* t) { return t == nullptr ? nullptr : data(*t); }
  const void* data(const Maybe& t) { return t.has_value() ? data(*t) : nullptr; }
  const void* data(const Maybe* t) { return t == nullptr ? nullptr : data(*t); }
  template <class Value, class T>
  const Value* data(const T& t) {
    return static_cast<const Value*>(data(t));
  }

  // The same of an image, or of kernels, with the second axis last.
  const void* channels_last(const Tensor& t);

  // A new tensor, row-major, or with the second axis last in memory.
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, bool second_last = false) const;

 private:
  static constexpr size_t kMost = 24;

  void check() const;
  std::string call() const;
  const void* copy(const Tensor& t, MemoryFormat format);

  const Signature& signature_;
  size_t count_ = 0;
  std::array<Argument, kMost> all_;
  std::vector<Tensor> copies_;
};

}  // namespace qnn

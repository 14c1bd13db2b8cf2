// The checks of an op's arguments, by its declaration in Python.
#include "ops/arguments.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <limits>
#include <map>
#include <stdexcept>
#include <utility>

namespace qnn {
namespace {

// -- dtypes

const std::pair<const char*, ScalarType> kDtypes[] = {
    {"float32", ScalarType::Float},
    {"bfloat16", ScalarType::BFloat16},
    {"float16", ScalarType::Half},
    {"float64", ScalarType::Double},
    {"int8", ScalarType::Char},
    {"uint8", ScalarType::Byte},
    {"int16", ScalarType::Short},
    {"int32", ScalarType::Int},
    {"int64", ScalarType::Long},
    {"bool", ScalarType::Bool},
    {"complex64", ScalarType::ComplexFloat},
    {"complex128", ScalarType::ComplexDouble},
    {"float8_e4m3fn", ScalarType::Float8_e4m3fn},
    {"float8_e5m2", ScalarType::Float8_e5m2},
    {"float8_e8m0fnu", ScalarType::Float8_e8m0fnu},
};

std::string name_of(ScalarType dtype) {
  for (const auto& [name, type] : kDtypes) {
    if (type == dtype) return name;
  }
  return "dtype " + std::to_string(static_cast<int>(dtype));
}

using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

std::string text_of(const Shape& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return text;
}

// As Python writes a number of not too many digits.
std::string text_of(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%.12g", number);
  const bool whole = std::string(text).find_first_not_of("-0123456789") == std::string::npos;
  return whole ? std::string(text) + ".0" : text;
}

// -- a declaration

// `k`, `4` or `k/128`, as in kernels/op/axes.py: a part, rounded up, of an axis, or of `number`.
struct Factor {
  int axis = -1;
  int64_t number = 1, divisor = 1;
};

// A product; or a function of others, which the op itself checks. (No op of this library needs a
// sum or a least size.)
struct Axis {
  std::string text;
  std::vector<Factor> factors;  // none: a function
  int name = -1;                // of which axis it is the whole
};

// What an axis may be.
struct Named {
  std::string name;
  int64_t most = std::numeric_limits<int64_t>::max(), multiple = 1;
};

enum class Kind { tensor, word, dtype, integers, plain };

struct Parameter {
  std::string name;
  Kind kind = Kind::tensor;
  bool optional = false, lead = false;  // any number of axes first
  size_t count = 0;                     // of a list of integers
  std::vector<Axis> axes;
  std::vector<std::string> allowed;  // words or dtypes; or, where it shares one, whose
  std::vector<ScalarType> dtypes;    // the same
  std::optional<size_t> like;        // whose dtype it shares

  std::string form() const {
    std::string text = lead ? "..." : "";
    for (const Axis& axis : axes) text += (text.empty() ? "" : ", ") + axis.text;
    return "[" + text + "]";
  }
};

constexpr int kAxes = 16;

}  // namespace

struct Signature {
  std::string op;
  std::vector<Parameter> parameters;
  std::vector<Named> axes;
};

namespace {

using Words = std::vector<std::string>;

template <class T, class U>
bool has(const std::vector<T>& all, const U& one) {
  return std::find(all.begin(), all.end(), one) != all.end();
}

Words apart(const std::string& text, char at) {
  Words parts(1);
  for (const char letter : text) {
    if (letter == at) {
      parts.emplace_back();
    } else {
      parts.back() += letter;
    }
  }
  return parts;
}

// Reads what `Declaration.checks` says.
class Reader {
 public:
  Reader(const std::string& op, const std::string& text, bool functions)
      : text_(text), functions_(functions) {
    signature_.op = op;
    for (const std::string& line : apart(text, '\n')) {
      const Words words = apart(line, ' ');
      if (words.size() == 3 && words[1] == "<=") {
        signature_.axes[axis_called(words[0])].most = number(words[2]);
      } else if (words.size() == 3 && words[1] == "%") {
        signature_.axes[axis_called(words[0])].multiple = number(words[2]);
      } else {
        signature_.parameters.push_back(parameter(words));
      }
    }
    if (signature_.axes.size() > kAxes) unreadable("so many axes");
    for (Parameter& p : signature_.parameters) {
      for (size_t i = 0; p.like.has_value() && i < signature_.parameters.size(); ++i) {
        if (signature_.parameters[i].name == p.allowed[0]) p.like = i;
      }
    }
  }

  Signature signature() { return std::move(signature_); }

 private:
  [[noreturn]] void unreadable(const std::string& what) const {
    throw std::invalid_argument("qnn::" + signature_.op + ": the C++ kernels cannot check " + what +
                                " of\n" + text_);
  }

  // A word of digits alone, or of those and letters.
  template <class Is>
  void require(const std::string& word, const Is& is) const {
    if (word.empty() || !std::all_of(word.begin(), word.end(), is)) unreadable(word);
  }

  int64_t number(const std::string& word) const {
    require(word, [](unsigned char c) { return std::isdigit(c); });
    return std::stoll(word);
  }

  int axis_called(const std::string& name) {
    require(name, [](unsigned char c) { return std::isalnum(c) || c == '_'; });
    auto& axes = signature_.axes;
    size_t i = 0;
    while (i < axes.size() && axes[i].name != name) ++i;
    if (i == axes.size()) axes.push_back({name});
    return static_cast<int>(i);
  }

  Factor factor(const std::string& text) {
    if (std::isdigit(static_cast<unsigned char>(text[0]))) return {-1, number(text)};
    const Words parts = apart(text, '/');
    if (parts.size() > 2) unreadable(text);
    return {axis_called(parts[0]), 1, parts.size() == 2 ? number(parts[1]) : 1};
  }

  Axis axis(const std::string& text) {
    Axis result{text, {}};
    if (functions_ && (text.back() == ')' || text.find('*') != std::string::npos)) return result;
    for (const std::string& each : apart(text, '*')) result.factors.push_back(factor(each));
    const Factor& first = result.factors[0];
    if (result.factors.size() == 1 && first.divisor == 1) result.name = first.axis;
    return result;
  }

  Parameter parameter(const Words& words) {
    Parameter result;
    result.name = words[0].substr(0, words[0].find(':'));
    if (result.name.back() == '?') result.name.pop_back(), result.optional = true;
    size_t i = 1;
    for (; i < words.size() && words[i] != "|" && words[i] != "="; ++i) {
      if (words[i] == "int") {
        result.kind = Kind::integers;
      } else if (words[i] == "ints" && i + 1 < words.size()) {
        result.kind = Kind::integers, result.count = number(words[++i]);
      } else if (words[i] == "plain") {
        result.kind = Kind::plain;
      } else if (words[i] == "dtype" || words[i] == "str") {
        result.kind = words[i] == "str" ? Kind::word : Kind::dtype;
      } else if (words[i] == "...") {
        result.lead = true;
      } else {
        result.axes.push_back(axis(words[i]));
      }
    }
    if (i == words.size()) unreadable(result.name);
    result.allowed.assign(words.begin() + i + 1, words.end());
    if (result.kind == Kind::integers || result.kind == Kind::plain) return result;
    if (words[i] == "=") {
      result.like = 0;
    } else if (result.kind == Kind::tensor || result.kind == Kind::dtype) {
      for (const auto& [name, type] : kDtypes) {
        if (has(result.allowed, name)) result.dtypes.push_back(type);
      }
      if (result.dtypes.size() != result.allowed.size()) unreadable(result.name);
    }
    return result;
  }

  const std::string& text_;
  const bool functions_;
  Signature signature_;
};

// -- the ops of this library

struct Registered {
  void (*kernel)(StableIValue*, uint64_t, uint64_t) = nullptr;
  bool checks_functions = false;
  Signature signature;
};

std::map<std::string, Registered>& registered() {
  static auto& all = *new std::map<std::string, Registered>;
  return all;
}

// Takes what Python declares, and gives the op its kernel, and that of the twin that an eager call
// without gradients goes to (Op.call).
void cpu_declare(std::string op, std::string checks) {
  const auto found = registered().find(op);
  if (found == registered().end() || found->second.kernel == nullptr)
    throw std::invalid_argument("qnn::" + op + ": the C++ library has no kernel of it.");
  found->second.signature = Reader(op, checks, found->second.checks_functions).signature();
  using torch::stable::detail::StableLibrary;
  static auto& library =
      *new StableLibrary(StableLibrary::Kind::IMPL, "qnn", "CPU", __FILE__, __LINE__);
  library.impl(op.c_str(), found->second.kernel);
  library.impl((op + "_no_grad").c_str(), found->second.kernel);
}

}  // namespace

const Signature& signature_of(const std::string& op) { return registered().at(op).signature; }

bool add_ops(std::initializer_list<NativeOp> ops) {
  for (const NativeOp& op : ops) {
    registered()[op.name].kernel = op.kernel;
    registered()[op.name].checks_functions = op.checks_functions;
  }
  return true;
}

DType float_format(ScalarType dtype) {
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
      throw std::invalid_argument("qnn: a kernel takes a dtype that it does not know.");
  }
}

// -- a call

namespace {

// A check that has failed: says why.
struct Misfit {
  const Signature& signature;
  const int64_t* sizes;
  const int* bound_by;  // of each axis, the parameter; or -1

  // The words of `too_long` in kernels/op/declaration.py.
  std::string limit(int axis) const {
    const Named& named = signature.axes[axis];
    const std::string size = std::to_string(sizes[axis]);
    if (sizes[axis] > named.most)
      return named.name + " must be at most " + std::to_string(named.most) +
             ", beyond which an int32 sum can overflow, got " + size +
             "; use the scheme int8_weight";
    const int64_t multiple = named.multiple,
                  padded = (sizes[axis] + multiple - 1) / multiple * multiple;
    return named.name + " must be a multiple of " + std::to_string(multiple) + ", got " + size +
           "; pad to " + std::to_string(padded) + " or exclude the layer";
  }

  std::string size(const Parameter& p, const Axis& axis, int64_t wanted, const Shape& shape) const {
    int source = -1;  // of the axes that it depends on, the first by name
    const auto& axes = signature.axes;
    for (const Factor& f : axis.factors) {
      if (f.axis >= 0 && (source < 0 || axes[f.axis].name < axes[source].name)) source = f.axis;
    }
    const std::string given = source < 0
                                  ? ""
                                  : " with " + axis.text + " = " + std::to_string(wanted) +
                                        " as in " + signature.parameters[bound_by[source]].name;
    return p.name + " must be " + p.form() + given + ", got [" + text_of(shape) + "]";
  }
};

std::string listed(const std::vector<std::string>& all, const char* before, const char* after) {
  std::string text;
  for (const std::string& each : all) text += (text.empty() ? "" : ", ") + (before + each) + after;
  return text;
}

int64_t size_of(const Axis& axis, const int64_t* sizes) {
  int64_t product = 1;
  for (const Factor& f : axis.factors)
    product *= f.axis < 0 ? f.number : div_up(sizes[f.axis], f.divisor);
  return product;
}

}  // namespace

void Arguments::check() const {
  const auto& parameters = signature_.parameters;
  if (parameters.size() != count_)
    throw std::invalid_argument("qnn: an op is not declared so to the C++ library: import qnn.");
  int64_t sizes[kAxes];
  int bound_by[kAxes];
  std::fill_n(bound_by, kAxes, -1);
  const Misfit misfit{signature_, sizes, bound_by};
  std::optional<Shape> lead;
  const auto dtype_of = [&](size_t i) {
    return all_[i].tensor != nullptr ? all_[i].tensor->scalar_type() : all_[i].dtype;
  };
  for (size_t i = 0; i < count_; ++i) {
    const Parameter& p = parameters[i];
    const Argument& a = all_[i];
    if (p.kind == Kind::plain) continue;
    if (p.kind == Kind::word) {
      if (!has(p.allowed, *a.word))
        fail(p.name + " must be one of " + listed(p.allowed, "'", "'") + ", got '" + *a.word + "'");
      continue;
    }
    if (p.kind == Kind::integers) {
      if (a.count != p.count)
        fail(p.name + " must hold " + std::to_string(p.count) + " integers, got " +
             std::to_string(a.count));
      continue;
    }
    if (p.kind == Kind::tensor && a.tensor == nullptr) continue;
    const ScalarType dtype = dtype_of(i);
    if (p.like.has_value()) {
      if (dtype != dtype_of(*p.like))
        fail(p.name + " must be torch." + name_of(dtype_of(*p.like)) + " as " + p.allowed[0] +
             ", got torch." + name_of(dtype) + "; cast it");
    } else if (!has(p.dtypes, dtype)) {
      fail(p.name + " must be one of " + listed(p.allowed, "torch.", ""));
    }
    if (p.kind == Kind::dtype) continue;
    if (!a.tensor->is_cpu())
      fail(p.name + " is not on the CPU, where the first argument is; move them together");
    const Shape shape = a.tensor->sizes();
    const auto tail = static_cast<int64_t>(p.axes.size()),
               before = static_cast<int64_t>(shape.size()) - tail;
    if (before < 0 || (before > 0 && !p.lead))
      fail(p.name + " must be " + p.form() + ", got [" + text_of(shape) + "]");
    if (p.lead && !lead.has_value()) {
      lead = shape.slice(0, before);
    } else if (p.lead && !lead->equals(shape.slice(0, before))) {
      fail(p.name + " must begin with (" + text_of(*lead) + (lead->size() == 1 ? ",)" : ")") +
           ", got [" + text_of(shape) + "]");
    }
    for (int64_t j = 0; j < tail; ++j) {
      const Axis& axis = p.axes[j];
      const int64_t size = shape[before + j];
      if (axis.factors.empty()) continue;
      if (axis.name >= 0 && bound_by[axis.name] < 0) {
        sizes[axis.name] = size, bound_by[axis.name] = static_cast<int>(i);
        const Named& named = signature_.axes[axis.name];
        if (size > named.most || size % named.multiple != 0) fail(misfit.limit(axis.name));
        continue;
      }
      const int64_t wanted = axis.name >= 0 ? sizes[axis.name] : size_of(axis, sizes);
      if (size != wanted) fail(misfit.size(p, axis, wanted, shape));
    }
  }
}

void Arguments::require_axis(const Tensor& t, int64_t axis, int64_t wanted, size_t source) const {
  if (t.size(axis) == wanted) return;
  size_t i = 0;
  while (all_[i].tensor != &t) ++i;
  const Parameter& p = signature_.parameters[i];
  fail(p.name + " must be " + p.form() + " with " + p.axes[axis].text + " = " +
       std::to_string(wanted) + " as in " + signature_.parameters[source].name + ", got [" +
       text_of(t.sizes()) + "]");
}

// The call, as it can be repeated; what is at its default is left out.
std::string Arguments::call() const {
  std::string text;
  for (size_t i = 0; i < count_; ++i) {
    const Parameter& p = signature_.parameters[i];
    const Argument& a = all_[i];
    std::string value;
    if (p.kind == Kind::word) {
      if (!p.optional || *a.word != p.allowed[0]) value = "'" + *a.word + "'";
    } else if (p.kind == Kind::dtype) {
      if (!p.optional || a.dtype != ScalarType::Float) value = "torch." + name_of(a.dtype);
    } else if (p.kind == Kind::plain) {
      if (a.flag) value = "True";
      if (a.number.has_value()) value = text_of(*a.number);
    } else if (p.kind == Kind::integers) {
      for (size_t j = 0; j < std::max<size_t>(a.count, 1); ++j)
        value += (j == 0 ? "" : ", ") + std::to_string(a.integers[j]);
      if (p.count > 0) value = "[" + value + "]";
      if (p.optional && value == p.allowed[0]) value.clear();
    } else if (a.tensor != nullptr) {
      value = name_of(a.tensor->scalar_type()) + "[" + text_of(a.tensor->sizes()) + "]";
    }
    if (!value.empty()) text += (text.empty() ? "" : ", ") + p.name + "=" + value;
  }
  return "qnn::" + signature_.op + "(" + text + ")";
}

void Arguments::fail(const std::string& reason) const {
  throw std::invalid_argument(call() + ": " + reason + ".");
}

void Arguments::no_memory(double bytes, const std::string& what) const {
  const std::string size =
      bytes < 9e15 ? std::to_string(static_cast<int64_t>(bytes)) : "more than 9e15";
  throw std::runtime_error(call() +
                           ": DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                           size + " bytes for " + what + ".");
}

const void* Arguments::data(const Tensor& t) {
  return t.is_contiguous() ? t.data_ptr() : copy(t, MemoryFormat::Contiguous);
}

const void* Arguments::channels_last(const Tensor& t) {
  return is_channels_last(t) ? t.data_ptr() : copy(t, MemoryFormat::ChannelsLast3d);
}

const void* Arguments::copy(const Tensor& t, MemoryFormat format) {
  try {
    copies_.push_back(torch::stable::contiguous(t, format));
    return copies_.back().data_ptr();
  } catch (const std::exception&) {  // whose words name this interface and not the reason
    const auto same = [&](const Argument& a) { return a.tensor == &t; };
    const size_t i = std::find_if(all_.begin(), all_.end(), same) - all_.begin();
    no_memory(static_cast<double>(t.numel()) * static_cast<double>(t.element_size()),
              "a dense copy of " + signature_.parameters[i].name);
  }
}

Tensor Arguments::empty(const std::vector<int64_t>& sizes, ScalarType dtype,
                        bool second_last) const {
  thread_local std::vector<int64_t> strides;
  strides.assign(sizes.size(), 1);
  int64_t stride = second_last ? std::max<int64_t>(sizes[1], 1) : 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (second_last && i == 1) continue;
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               code, aoti_torch_device_type_cpu(), 0, &handle) != 0) {
    auto bytes = static_cast<double>(aoti_torch_dtype_element_size(code));
    for (const int64_t size : sizes) bytes *= static_cast<double>(size);
    no_memory(bytes, "its result");
  }
  return Tensor(handle);
}

}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) { m.def("cpu_declare(str op, str checks) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(qnn, CompositeExplicitAutograd, m) {
  m.impl("cpu_declare", TORCH_BOX(&qnn::cpu_declare));
}

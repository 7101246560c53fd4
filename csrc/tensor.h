// The address, element type, device, sizes and strides of a Python tensor. torch is neither linked
// nor imported. From 2.10 on its tensors offer DLPack's table of C functions, which returns all of
// this in one call; with an older torch the tensor's own methods are called, at ten times the cost.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace fastrnn {

namespace py = pybind11;

[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument(what); }

// The part of DLPack's interface that is used here, in the layout of its version 1.3
// (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
namespace dlpack {

struct Tensor {
  void* data;
  int32_t device, device_index;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Table {
  uint32_t major, minor;
  Table* older;
  void* allocator;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  void* stream;
};

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2;

}  // namespace dlpack

struct Element {
  uint8_t code, bits;
  bool operator==(const Element& other) const { return code == other.code && bits == other.bits; }
};

template <class T>
constexpr Element element_of = {std::is_floating_point_v<T> ? dlpack::kFloat : dlpack::kInt,
                                8 * sizeof(T)};

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

struct Names {
  PyObject* table = interned("__dlpack_c_exchange_api__");
  PyObject* data_ptr = interned("data_ptr");
  PyObject* is_cpu = interned("is_cpu");
  PyObject* is_neg = interned("is_neg");
  PyObject* resolve_neg = interned("resolve_neg");
  PyObject* contiguous = interned("contiguous");
  PyObject* shape = interned("shape");
  PyObject* stride = interned("stride");
  PyObject* dtype = interned("dtype");
  PyObject* new_empty = interned("new_empty");
};

inline const Names& names() {
  static const Names* const all = new Names;
  return *all;
}

inline py::object call(py::handle object, PyObject* method) {
  PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object attribute(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

class Tensor {
 public:
  static constexpr int kMaxDimensions = 8;

  // `object` must outlive this Tensor, and must not be modified.
  Tensor(py::handle object, const char* name) : name_(name) {
    if (const dlpack::Table* table = table_of(Py_TYPE(object.ptr()))) {
      dlpack::Tensor t;
      if (table->tensor_from_object(object.ptr(), &t)) {
        PyErr_Clear();  // its message is a trace of frames inside torch
        fail(std::string(name_) + ": expected a CPU tensor with plain strides");
      }
      if (t.device != dlpack::kCpu) fail(std::string(name_) + ": expected a CPU tensor");
      take(t.dimensions, [&](int k) { return t.shape[k]; }, [&](int k) { return t.strides[k]; });
      element_ = t.lanes == 1 ? Element{t.code, t.bits} : Element{0xff, 0};
      data_ = static_cast<char*>(t.data) + t.byte_offset;
    } else {
      if (attribute(object, names().is_cpu).ptr() != Py_True)
        fail(std::string(name_) + ": expected a CPU tensor");
      try {
        const auto shape = py::cast<py::tuple>(attribute(object, names().shape));
        const auto stride = py::cast<py::tuple>(call(object, names().stride));
        if (shape.size() != stride.size())
          fail(std::string(name_) + ": expected one stride for each size");
        take(
            shape.size(), [&](int k) { return py::cast<int64_t>(shape[k]); },
            [&](int k) { return py::cast<int64_t>(stride[k]); });
        data_ = reinterpret_cast<char*>(py::cast<intptr_t>(call(object, names().data_ptr)));
      } catch (const py::error_already_set&) {  // torch's message depends on the kind of tensor
        fail(std::string(name_) + ": expected a CPU tensor with plain strides");
      }
      element_ = element_named(attribute(object, names().dtype));
    }
  }

  int dimensions() const { return dimensions_; }
  int64_t size(int k) const { return size_[k]; }
  int64_t count() const { return count_; }
  Element element() const { return element_; }

  std::string shape() const {
    std::string all = "[";
    for (int k = 0; k < dimensions_; ++k) all += (k ? ", " : "") + std::to_string(size_[k]);
    return all + "]";
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int k = dimensions_ - 1; k >= 0 && count_; --k) {
      if (size_[k] != 1 && stride_[k] != expected) return false;
      expected *= size_[k];
    }
    return true;
  }

  // The address of the first element. The caller has already checked the sizes.
  template <class T>
  T* data() const {
    if (!(element_ == element_of<T>)) {
      fail(std::string(name_) + ": expected elements of " + described(element_of<T>) + ", got " +
           described(element_));
    }
    if (reinterpret_cast<uintptr_t>(data_) % alignof(T))
      fail(std::string(name_) + ": address is not aligned");
    if (!data_ && count_) fail(std::string(name_) + ": tensor has no memory");
    return reinterpret_cast<T*>(data_);
  }

 private:
  // A type that inherits the table from torch.Tensor, like Parameter, has the same layout. The
  // first four types are cached, and never released.
  static const dlpack::Table* table_of(PyTypeObject* type) {
    static PyTypeObject* known[4] = {};
    static const dlpack::Table* tables[4] = {};
    for (int k = 0; k < 4; ++k) {
      if (known[k] == type) return tables[k];
    }
    const dlpack::Table* table = nullptr;
    if (PyObject* capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), names().table)) {
      table =
          static_cast<const dlpack::Table*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
      Py_DECREF(capsule);
    }
    PyErr_Clear();
    while (table && table->major != dlpack::kMajor) table = table->older;
    if (table && !table->tensor_from_object) table = nullptr;
    for (int k = 0; k < 4; ++k) {
      if (!known[k]) {
        Py_INCREF(type);
        known[k] = type, tables[k] = table;
        break;
      }
    }
    return table;
  }

  static Element element_named(const py::object& dtype) {
    static auto* const known = new std::unordered_map<PyObject*, Element>;
    const auto found = known->find(dtype.ptr());
    if (found != known->end()) return found->second;
    const auto name = py::str(dtype).cast<std::string>();
    Element element{0xff, 0};
    if (name == "torch.float32") element = element_of<float>;
    if (name == "torch.float64") element = element_of<double>;
    if (name == "torch.int64") element = element_of<int64_t>;
    dtype.inc_ref();
    known->emplace(dtype.ptr(), element);
    return element;
  }

  static std::string described(Element element) {
    const char* kind = element.code == dlpack::kFloat ? "float"
                       : element.code == dlpack::kInt ? "int"
                                                      : "another kind";
    return element.bits ? kind + std::to_string(element.bits) : kind;
  }

  template <class Size, class Stride>
  void take(int64_t dimensions, const Size& size, const Stride& stride) {
    if (dimensions > kMaxDimensions) {
      fail(std::string(name_) + ": expected at most " + std::to_string(kMaxDimensions) +
           " dimensions, got " + std::to_string(dimensions));
    }
    dimensions_ = static_cast<int>(dimensions);
    for (int k = 0; k < dimensions_; ++k) {
      size_[k] = size(k), stride_[k] = stride(k);
      if (size_[k] < 0 || __builtin_mul_overflow(count_, size_[k], &count_)) {
        fail(std::string(name_) + ": expected sizes that an address can count");
      }
    }
  }

  const char* name_;
  char* data_ = nullptr;
  Element element_{0xff, 0};
  int dimensions_ = 0;
  int64_t size_[kMaxDimensions], stride_[kMaxDimensions];
  int64_t count_ = 1;
};

}  // namespace fastrnn

// The Python module fastrnn._cpp. It neither links nor imports torch: a tensor is asked for what it
// is (dtype, device, layout, size) by its own methods, and every size is checked against what the
// engine will touch before an address is used.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "engine.h"

namespace py = pybind11;
using namespace fastrnn;

namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

// a * b * ..., or an error where that is no address range.
template <class... Sizes>
int64_t product(const char* name, Sizes... sizes) {
  int64_t result = 1;
  for (int64_t size : {static_cast<int64_t>(sizes)...}) {
    if (size < 0) fail(std::string(name) + ": expected sizes of 0 or more");
    if (__builtin_mul_overflow(result, size, &result)) {
      fail(std::string(name) + ": more elements than an address can count");
    }
  }
  if (result > INT64_MAX / 16)
    fail(std::string(name) + ": more elements than an address can count");
  return result;
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

py::object call(py::handle object, PyObject* method) {
  PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

int64_t integer(py::handle object, PyObject* method) {
  const int64_t value = PyLong_AsLongLong(call(object, method).ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool truth(py::handle object, PyObject* method) { return call(object, method).ptr() == Py_True; }

py::object attribute(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

struct Methods {
  PyObject* data_ptr = interned("data_ptr");
  PyObject* numel = interned("numel");
  PyObject* element_size = interned("element_size");
  PyObject* is_contiguous = interned("is_contiguous");
  PyObject* is_cpu = interned("is_cpu");
  PyObject* is_floating_point = interned("is_floating_point");
  PyObject* stride = interned("stride");
  PyObject* dtype = interned("dtype");
};

const Methods& methods() {
  static const Methods all;
  return all;
}

// The element type that a call's tensors must have. The first tensor is asked what its type is, and
// of the others only whether it is the same object.
template <class T>
class Type {
 public:
  explicit Type(py::handle first, const char* name) {
    const Methods& m = methods();
    const int64_t size = integer(first, m.element_size);
    if (truth(first, m.is_floating_point) != std::is_floating_point_v<T> ||
        size != static_cast<int64_t>(sizeof(T))) {
      fail(std::string(name) + ": expected elements of " + described() + ", got " +
           py::str(first.attr("dtype")).cast<std::string>());
    }
    dtype_ = attribute(first, m.dtype);
  }

  void check(py::handle tensor, const char* name) const {
    const py::object dtype = attribute(tensor, methods().dtype);
    if (!dtype.is(dtype_)) {
      fail(std::string(name) + ": expected elements of " + described() + ", got " +
           py::str(dtype).cast<std::string>());
    }
    if (attribute(tensor, methods().is_cpu).ptr() != Py_True) {
      fail(std::string(name) + ": expected a CPU tensor");
    }
  }

  // The address of a contiguous CPU tensor of exactly `expected` elements.
  T* address(py::handle tensor, const char* name, int64_t expected) const {
    const Methods& m = methods();
    check(tensor, name);
    const int64_t count = integer(tensor, m.numel);
    if (count != expected) {
      fail(std::string(name) + ": expected " + std::to_string(expected) + " elements, got " +
           std::to_string(count));
    }
    if (!truth(tensor, m.is_contiguous)) {
      fail(std::string(name) + ": expected a contiguous tensor");
    }
    return at(tensor, name, expected);
  }

  T* optional(py::handle tensor, const char* name, int64_t expected) const {
    return tensor.is_none() ? nullptr : address(tensor, name, expected);
  }

  static T* at(py::handle tensor, const char* name, int64_t elements) {
    const int64_t address = integer(tensor, methods().data_ptr);
    if (address % static_cast<int64_t>(sizeof(T))) {
      fail(std::string(name) + ": address is not aligned");
    }
    if (!address && elements) fail(std::string(name) + ": tensor has no memory");
    return reinterpret_cast<T*>(address);
  }

 private:
  static std::string described() {
    return (std::is_floating_point_v<T> ? "float" : "int") + std::to_string(8 * sizeof(T));
  }

  py::object dtype_;
};

void expect_length(const py::tuple& items, size_t expected, const char* name) {
  if (items.size() != expected) {
    fail(std::string(name) + ": expected " + std::to_string(expected) + " items, got " +
         std::to_string(items.size()));
  }
}

const Engine& engine_named(const std::string& name) {
  for (const Engine* engine : engines()) {
    if (name == engine->name) {
      if (!engine->runs_here()) fail("this processor does not run " + name);
      return *engine;
    }
  }
  fail("no engine was compiled for " + name);
}

// What forward and backward are both told of a layer.
struct Call {
  const Engine& engine;
  int cell;
  const CellInfo& info;
  Rows rows;
  int64_t N, B, I, H, P, D;
  int threads;

  static Rows make_rows(int64_t N, int64_t B, py::handle batch_sizes) {
    if (batch_sizes.is_none()) return Rows(N, B, nullptr, 0);
    const int64_t T = integer(batch_sizes, methods().numel);
    const Type<int64_t> type(batch_sizes, "batch_sizes");
    return Rows(N, B, type.address(batch_sizes, "batch_sizes", T), T);
  }

  static const CellInfo& cell_at(const Engine& engine, int cell) {
    if (cell < 0 || cell >= engine.cells) {
      fail("expected a cell from 0 to " + std::to_string(engine.cells - 1) + ", got " +
           std::to_string(cell));
    }
    return engine.cell[cell];
  }

  Call(const std::string& isa, int cell_, int threads_, py::handle batch_sizes, int64_t N_,
       int64_t B_, int64_t I_, int64_t H_, int64_t P_, int64_t D_)
      : engine(engine_named(isa)),
        cell(cell_),
        info(cell_at(engine, cell_)),
        rows(make_rows(N_, B_, batch_sizes)),
        N(N_),
        B(B_),
        I(I_),
        H(H_),
        P(P_),
        D(D_),
        threads(set_threads(threads_)) {
    if (I < 0 || H < 1 || P < 1) {
      fail("expected I >= 0, H >= 1 and P >= 1, got I=" + std::to_string(I) +
           ", H=" + std::to_string(H) + ", P=" + std::to_string(P));
    }
    if (D < 1 || D > kMaxDirections) fail("expected 1 or 2 directions, got " + std::to_string(D));
  }

  template <class T>
  void fill(Layer<T>& a, const Type<T>& type, const py::tuple& weights, py::handle state) const {
    a.rows = &rows;
    a.I = I, a.H = H, a.P = P, a.D = static_cast<int>(D), a.threads = threads;
    expect_length(weights, D, "weights");
    const int64_t gate_rows = product("weights", info.gates, H);
    for (int d = 0; d < D; ++d) {
      const auto w = py::cast<py::tuple>(weights[d]);
      expect_length(w, 5, "weights of a direction");
      a.weights[d].ih = type.address(w[0], "weight_ih", product("weight_ih", gate_rows, I));
      a.weights[d].hh = type.address(w[1], "weight_hh", product("weight_hh", gate_rows, P));
      a.weights[d].bias_ih = type.optional(w[2], "bias_ih", gate_rows);
      a.weights[d].bias_hh = type.optional(w[3], "bias_hh", gate_rows);
      a.weights[d].hr = type.optional(w[4], "weight_hr", product("weight_hr", P, H));
      if (a.weights[d].hr ? !info.projectable : P != H) {
        fail("expected P == H without weight_hr, and none for a cell that cannot be projected");
      }
      if (!a.weights[d].hr != !a.weights[0].hr)
        fail("expected weight_hr in every direction or none");
    }
    states(a.state, type, state, "state", false);
  }

  // One tensor for each state of the cell; `state` may be None, and its items if `each`.
  template <class T, class Pointer>
  void states(Pointer* into, const Type<T>& type, py::handle state, const char* name,
              bool each) const {
    if (state.is_none()) return;
    const auto items = py::cast<py::tuple>(state);
    expect_length(items, info.states, name);
    for (int k = 0; k < info.states; ++k) {
      const int64_t expected = product(name, D, B, k ? H : P);
      into[k] =
          each ? type.optional(items[k], name, expected) : type.address(items[k], name, expected);
    }
  }
};

template <class T>
void forward_as(const Call& c, py::handle x, const py::tuple& weights, py::handle state,
                py::handle out, py::handle final, py::handle saved) {
  const Type<T> type(x, "x");
  Forward<T> a;
  c.fill(a, type, weights, state);
  a.x = type.address(x, "x", product("x", c.N, c.I));
  a.out = type.address(out, "out", product("out", c.N, c.D, c.P));
  if (final.is_none()) fail("final: expected a tuple, got None");
  c.states(a.final, type, final, "final", false);
  a.saved =
      type.optional(saved, "saved", product("saved", c.D, c.N, c.info.kept(a.projected()), c.H));
  py::gil_scoped_release release;
  c.engine.forward(c.cell, a);
}

template <class T>
void backward_as(const Call& c, const py::tuple& weights, py::handle state, py::handle out,
                 py::handle saved, py::handle dout, py::handle dfinal, py::handle dpre,
                 py::handle dbias, py::handle dstate, py::handle dh) {
  const Type<T> type(out, "out");
  Backward<T> a;
  c.fill(a, type, weights, state);
  const int64_t rows_of_h = product("out", c.N, c.D, c.P);
  a.out = type.address(out, "out", rows_of_h);
  a.saved =
      type.address(saved, "saved", product("saved", c.D, c.N, c.info.kept(a.projected()), c.H));
  a.dout = type.optional(dout, "dout", rows_of_h);
  c.states(a.dfinal, type, dfinal, "dfinal", true);
  a.dpre = type.address(dpre, "dpre", product("dpre", c.D, c.N, c.info.slots(), c.H));
  a.dbias = type.address(dbias, "dbias", product("dbias", c.D, c.info.slots(), c.H));
  if (dstate.is_none()) fail("dstate: expected a tuple, got None");
  c.states(a.dstate, type, dstate, "dstate", false);
  if (a.projected()) a.dh = type.address(dh, "dh", product("dh", c.D, c.N, c.P));
  py::gil_scoped_release release;
  c.engine.backward(c.cell, a);
}

// A matrix by its address and strides; torch's views of other tensors come as they are.
template <class T>
struct View {
  T* at;
  int64_t rows, columns, row, column;

  View(const Type<T>& type, py::handle tensor, const char* name) {
    type.check(tensor, name);
    const auto shape = pair(tensor.attr("shape"), name);
    const auto stride = pair(call(tensor, methods().stride), name);
    rows = shape.first, columns = shape.second, row = stride.first, column = stride.second;
    at = Type<T>::at(tensor, name, rows * columns);
  }

  static std::pair<int64_t, int64_t> pair(const py::object& items, const char* name) {
    const auto tuple = py::cast<py::tuple>(items);
    if (tuple.size() != 2) fail(std::string(name) + ": expected a matrix");
    return {py::cast<int64_t>(tuple[0]), py::cast<int64_t>(tuple[1])};
  }
};

template <class T>
void matmul_as(const Engine& engine, int threads, py::handle a_, py::handle b_, py::handle c_,
               bool add) {
  const Type<T> type(a_, "a");
  const View<T> a(type, a_, "a"), b(type, b_, "b"), c(type, c_, "c");
  if (a.columns != b.rows || a.rows != c.rows || b.columns != c.columns) {
    fail("expected [M, K] @ [K, N] into [M, N], got " + std::to_string(a.rows) + " x " +
         std::to_string(a.columns) + ", " + std::to_string(b.rows) + " x " +
         std::to_string(b.columns) + " into " + std::to_string(c.rows) + " x " +
         std::to_string(c.columns));
  }
  if ((b.column != 1 && b.columns > 1 && b.rows > 0) ||
      (c.column != 1 && c.columns > 1 && c.rows > 0)) {
    fail("expected b and c with rows whose elements lie side by side");
  }
  Matmul<T> m;
  m.M = a.rows, m.N = b.columns, m.K = a.columns;
  m.a = a.at, m.a_row = a.row, m.a_column = a.column;
  m.b = b.at, m.b_row = b.row;
  m.c = c.at, m.c_row = c.row;
  m.add = add;
  m.threads = set_threads(threads);
  py::gil_scoped_release release;
  engine.matmul(m);
}

// What x is decides the type; every other tensor must follow.
template <class Run>
void with_type(py::handle tensor, const Run& run) {
  const int64_t size = integer(tensor, methods().element_size);
  if (size == 4) {
    run(float());
  } else if (size == 8) {
    run(double());
  } else {
    fail("expected elements of float32 or float64, got " + std::to_string(8 * size) + " bits");
  }
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  m.doc() = "The C++ engine of fastrnn; fastrnn.backends.cpp is its only caller.";

  m.def(
      "forward",
      [](const std::string& isa, int cell, int threads, py::object batch_sizes, int64_t N,
         int64_t B, int64_t I, int64_t H, int64_t P, int64_t D, py::object x, py::tuple weights,
         py::object state, py::object out, py::object final, py::object saved) {
        const Call c(isa, cell, threads, batch_sizes, N, B, I, H, P, D);
        with_type(x, [&](auto zero) {
          forward_as<decltype(zero)>(c, x, weights, state, out, final, saved);
        });
      },
      "Run a layer; arguments as in engine.h. Writes out, final and, unless None, saved.");

  m.def(
      "backward",
      [](const std::string& isa, int cell, int threads, py::object batch_sizes, int64_t N,
         int64_t B, int64_t I, int64_t H, int64_t P, int64_t D, py::tuple weights, py::object state,
         py::object out, py::object saved, py::object dout, py::object dfinal, py::object dpre,
         py::object dbias, py::object dstate, py::object dh) {
        const Call c(isa, cell, threads, batch_sizes, N, B, I, H, P, D);
        with_type(out, [&](auto zero) {
          backward_as<decltype(zero)>(c, weights, state, out, saved, dout, dfinal, dpre, dbias,
                                      dstate, dh);
        });
      },
      "Run a layer in reverse. Writes dpre, dbias, dstate and, if projected, dh.");

  m.def(
      "matmul",
      [](const std::string& isa, int threads, py::object a, py::object b, py::object c, bool add) {
        const Engine& engine = engine_named(isa);
        with_type(a, [&](auto zero) { matmul_as<decltype(zero)>(engine, threads, a, b, c, add); });
      },
      "c = a @ b, or c += a @ b.");

  py::class_<Scratch>(m, "Scratch", py::buffer_protocol(),
                      "Memory that is kept for reuse once nobody refers to it.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](Scratch& s) {
        return py::buffer_info(static_cast<uint8_t*>(s.data()), static_cast<py::ssize_t>(s.size()));
      });

  m.def(
      "cells",
      [] {
        py::list all;
        const Engine& engine = *engines().back();
        for (int k = 0; k < engine.cells; ++k) {
          const CellInfo& c = engine.cell[k];
          all.append(py::make_tuple(c.mode, c.gates, c.shared, c.states, c.saved, c.projectable));
        }
        return py::tuple(all);
      },
      "Every cell: (mode, gates, shared, states, saved, projectable).");

  m.def(
      "isas",
      [] {
        py::list names;
        for (const Engine* engine : engines()) {
          if (engine->runs_here()) names.append(engine->name);
        }
        return py::tuple(names);
      },
      "The instruction sets that were compiled in and run here, best first.");

  m.def("threading", &threading, "Name of the threading library that was compiled in, or None.");
  m.def("poison", &Scratch::poison, py::arg("on"),
        "Fill scratch memory with NaN before every use, for tests.");
}

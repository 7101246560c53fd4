// The Python module fastrnn._cpp. It checks the size of every tensor against the memory that the
// engine will access before it uses an address, and it allocates the results.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "parallel.h"
#include "scratch.h"
#include "tensor.h"

using namespace fastrnn;

namespace {

// The sizes that a tensor must have. With `folded`, only the last size and the number of elements
// must agree.
class Shape {
 public:
  Shape(std::initializer_list<int64_t> sizes, bool folded = false)
      : n_(static_cast<int>(sizes.size())), folded_(folded) {
    std::copy(sizes.begin(), sizes.end(), sizes_);
  }

  void check(const Tensor& tensor, const char* name) const {
    int64_t count = 1;
    for (int k = 0; k < n_; ++k) {
      const int64_t size = sizes_[k];
      if (size < 0) fail(std::string(name) + ": expected sizes of 0 or more");
      if (__builtin_mul_overflow(count, size, &count) || count > INT64_MAX / 16) {
        fail(std::string(name) + ": more elements than an address can count");
      }
    }
    const int common = std::min(folded_ ? 1 : n_, tensor.dimensions());
    bool fits = tensor.count() == count && (folded_ ? common > 0 : tensor.dimensions() == n_);
    for (int k = 1; k <= common; ++k) {
      fits &= tensor.size(tensor.dimensions() - k) == sizes_[n_ - k];
    }
    if (!fits) fail(std::string(name) + ": expected " + text() + ", got " + tensor.shape());
  }

 private:
  std::string text() const {
    std::string all = folded_ ? "the elements and the last size of [" : "[";
    for (int k = 0; k < n_; ++k) all += (k ? ", " : "") + std::to_string(sizes_[k]);
    return all + "]";
  }

  int64_t sizes_[4];
  int n_;
  bool folded_;
};

template <class T>
T* address_of(const Tensor& tensor, const char* name, const Shape& shape) {
  shape.check(tensor, name);
  return tensor.data<T>();
}

// The address of a tensor that was allocated for a result.
template <class T>
T* writable(py::handle object, const Shape& shape) {
  const Tensor tensor(object, "result");
  if (!tensor.contiguous()) fail("result: expected a contiguous tensor");
  return address_of<T>(tensor, "result", shape);
}

// Results of this size or more are allocated by a Python function, in memory that is reused: the
// default allocator would map, and the kernel clear, such memory in every call. The reference is
// never released, because a static destructor would run after Python has been finalised.
size_t g_large = SIZE_MAX;
PyObject* g_make_large = nullptr;

// Allocates a tensor with the dtype and device of `like`. Returns it, and its address in `address`.
template <class T>
py::object allocate(py::handle like, std::initializer_list<int64_t> shape, T*& address) {
  PyObject* arguments[1 + Tensor::kMaxDimensions] = {like.ptr()};
  size_t count = 1;
  double bytes = sizeof(T);
  py::object sizes[Tensor::kMaxDimensions];
  for (int64_t size : shape) {
    bytes *= static_cast<double>(size);
    sizes[count - 1] = py::int_(size);
    arguments[count] = sizes[count - 1].ptr();
    ++count;
  }
  PyObject* result =
      bytes >= static_cast<double>(g_large)
          ? PyObject_Vectorcall(g_make_large, arguments, count, nullptr)
          : PyObject_VectorcallMethod(names().new_empty, arguments,
                                      count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (!result) throw py::error_already_set();
  py::object tensor = py::reinterpret_steal<py::object>(result);
  address = writable<T>(tensor, shape);
  return tensor;
}

// torch may mark a tensor as negated instead of negating its elements. This check costs as much as
// all others together, so it is not made for weights: a tensor can only be contiguous and negated
// if it was made by torch's private _neg_view, or has a single element.
bool negated(py::handle object) { return call(object, names().is_neg).ptr() == Py_True; }

// The addresses of tensors that are read, or of contiguous copies, which live as long as this
// object.
class Readable {
 public:
  template <class T>
  const T* weight(py::handle object, const char* name, const Shape& shape) {
    return object.is_none() ? nullptr : address<T>(object, name, shape, false);
  }

  template <class T>
  const T* address(py::handle object, const char* name, const Shape& shape, bool data = true) {
    const Tensor tensor(object, name);
    // Checked first, so that a tensor of the wrong shape is not copied.
    const T* at = address_of<T>(tensor, name, shape);
    if (tensor.contiguous() && !(data && negated(object))) return at;
    copies_.push_back(call(call(object, names().contiguous), names().resolve_neg));
    const Tensor copy(copies_.back(), name);
    if (!copy.contiguous()) fail(std::string(name) + ": expected a contiguous tensor");
    return address_of<T>(copy, name, shape);
  }

  template <class T>
  const T* optional(py::handle object, const char* name, const Shape& shape) {
    return object.is_none() ? nullptr : address<T>(object, name, shape);
  }

 private:
  std::vector<py::object> copies_;
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
      if (!engine->runs_here()) fail("this processor does not support " + name);
      return *engine;
    }
  }
  fail("the engine was not compiled for " + name);
}

constexpr size_t kWeights = 5;  // of a direction: w_ih, w_hh, b_ih, b_hh, w_hr

// Releases the GIL, if the work takes longer than releasing and acquiring it.
class WithoutGil {
 public:
  explicit WithoutGil(double flops) {
    if (flops > 2e5) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

// The arguments that forward and backward have in common.
struct Call {
  const Engine& engine;
  int cell;
  const CellInfo& info;
  const Tensor x;
  const bool packed, step;  // a dense batch of one step is [B, I], and its state [B, H]
  const Rows rows;
  int64_t N, B, I, H, P, D;
  int threads;
  bool deterministic;

  static Rows make_rows(const Tensor& x, py::handle batch_sizes) {
    const int expected = batch_sizes.is_none() && x.dimensions() == 3 ? 3 : 2;
    if (x.dimensions() != expected) {
      fail("x: expected [T, B, I], [B, I], or with batch_sizes [N, I], got " + x.shape());
    }
    if (batch_sizes.is_none()) {
      const int64_t B = x.size(expected - 2);
      return Rows(expected == 3 ? x.size(0) * B : B, B, nullptr, 0);
    }
    Readable readable;
    const int64_t T = Tensor(batch_sizes, "batch_sizes").count();
    const int64_t* sizes = readable.address<int64_t>(batch_sizes, "batch_sizes", {{T}});
    return Rows(x.size(0), T ? sizes[0] : 0, sizes, T);
  }

  static const CellInfo& cell_at(const Engine& engine, int cell) {
    if (cell < 0 || cell >= engine.cells) {
      fail("expected a cell from 0 to " + std::to_string(engine.cells - 1) + ", got " +
           std::to_string(cell));
    }
    return engine.cell[cell];
  }

  Call(const std::string& isa, int cell_, int threads_, bool deterministic_, py::handle batch_sizes,
       py::handle x_, const py::tuple& weights)
      : engine(engine_named(isa)),
        cell(cell_),
        info(cell_at(engine, cell_)),
        x(x_, "x"),
        packed(!batch_sizes.is_none()),
        step(!packed && x.dimensions() == 2),
        rows(make_rows(x, batch_sizes)),
        N(rows.N),
        B(rows.B),
        I(x.size(x.dimensions() - 1)),
        D(static_cast<int64_t>(weights.size())),
        threads(set_threads(threads_)),
        deterministic(deterministic_) {
    if (D < 1 || D > kMaxDirections) fail("expected 1 or 2 directions, got " + std::to_string(D));
    if (step && D != 1) fail("expected one direction for one step, got " + std::to_string(D));
    const Tensor hh(direction(weights, 0)[1], "weight_hh");
    if (hh.dimensions() != 2 || hh.size(0) % info.gates) {
      fail("weight_hh: expected [" + std::to_string(info.gates) + " * H, P], got " + hh.shape());
    }
    H = hh.size(0) / info.gates, P = hh.size(1);
    if (H < 1 || P < 1) fail("expected H >= 1 and P >= 1, got weight_hh of " + hh.shape());
  }

  static py::tuple direction(const py::tuple& weights, int64_t d) {
    auto w = py::cast<py::tuple>(weights[d]);
    expect_length(w, kWeights, "weights of a direction");
    return w;
  }

  double flops() const { return 2.0 * D * N * info.gates * H * (I + P); }

  // [N, features], in the dimensions of x.
  template <class T>
  py::object allocate_rows(py::handle like, int64_t features, T*& address) const {
    return packed || step ? allocate<T>(like, {N, features}, address)
                          : allocate<T>(like, {x.size(0), B, features}, address);
  }

  template <class T>
  py::object allocate_state(py::handle like, int k, T*& address) const {
    const int64_t size = k ? H : P;
    return step ? allocate<T>(like, {B, size}, address) : allocate<T>(like, {D, B, size}, address);
  }

  template <class T>
  void fill(Layer<T>& a, const py::tuple& weights, py::handle state, Readable& readable) const {
    a.rows = &rows;
    a.I = I, a.H = H, a.P = P, a.D = static_cast<int>(D), a.threads = threads;
    a.deterministic = deterministic;
    const int64_t gate_size = info.gates * H;
    for (int64_t d = 0; d < D; ++d) {
      const py::tuple w = direction(weights, d);
      Weights<T>& to = a.weights[d];
      to.ih = readable.weight<T>(w[0], "weight_ih", {{gate_size, I}});
      to.hh = readable.weight<T>(w[1], "weight_hh", {{gate_size, P}});
      to.bias_ih = readable.weight<T>(w[2], "bias_ih", {{gate_size}});
      to.bias_hh = readable.weight<T>(w[3], "bias_hh", {{gate_size}});
      to.hr = readable.weight<T>(w[4], "weight_hr", {{P, H}});
      if (w[0].is_none() || w[1].is_none()) fail("expected weight_ih and weight_hh, got None");
      if (!to.bias_ih != !to.bias_hh) fail("expected both bias_ih and bias_hh or neither");
      if (to.hr ? !info.projectable : P != H) {
        fail("expected P == H without weight_hr, and none for a cell that cannot be projected");
      }
      if (!to.hr != !a.weights[0].hr) fail("expected weight_hr in every direction or none");
    }
    states(state, "state", [&](int k, py::handle item, const Shape& shape) {
      a.state[k] = readable.address<T>(item, "state", shape);
    });
  }

  // take(k, tensor, shape) for each state of the cell; `tensors` may be None.
  template <class Take>
  void states(py::handle tensors, const char* name, const Take& take) const {
    if (tensors.is_none()) return;
    const auto items = py::cast<py::tuple>(tensors);
    expect_length(items, info.states, name);
    for (int k = 0; k < info.states; ++k) {
      const int64_t size = k ? H : P;
      take(k, items[k], step ? Shape{B, size} : Shape{D, B, size});
    }
  }
};

template <class T>
py::tuple forward_as(const Call& c, py::handle x, const py::tuple& weights, py::handle state,
                     bool save) {
  Forward<T> a;
  Readable readable;
  c.fill(a, weights, state, readable);
  a.x = readable.address<T>(x, "x", {{c.N, c.I}, true});
  const py::object out = c.allocate_rows(x, c.D * c.P, a.out);
  py::tuple final(c.info.states);
  // One step has a single h, its output; autograd, however, needs two distinct tensors.
  const bool same = c.step && !save;
  if (same) final[0] = out, a.final[0] = a.out;
  for (int k = same; k < c.info.states; ++k) final[k] = c.allocate_state(x, k, a.final[k]);
  py::object saved = py::none();
  if (save) saved = allocate<T>(x, {c.D, c.N, c.info.num_saved(a.projected()), c.H}, a.saved);
  {
    const WithoutGil release(c.flops());
    c.engine.forward(c.cell, a);
  }
  return py::make_tuple(out, final, saved);
}

template <class T>
py::tuple backward_as(const Call& c, py::handle x, const py::tuple& weights, py::handle state,
                      py::handle out, py::handle saved, py::handle dout, py::handle dfinal,
                      const py::tuple& needed) {
  Backward<T> a;
  Readable readable;
  c.fill(a, weights, state, readable);
  a.x = readable.address<T>(x, "x", {{c.N, c.I}, true});
  a.out = readable.address<T>(out, "out", {{c.N, c.D * c.P}, true});
  a.saved = readable.address<T>(saved, "saved", {{c.D, c.N, c.info.num_saved(a.projected()), c.H}});
  a.dout = readable.optional<T>(dout, "dout", {{c.N, c.D * c.P}, true});
  c.states(dfinal, "dfinal", [&](int k, py::handle item, const Shape& shape) {
    a.dfinal[k] = readable.optional<T>(item, "dfinal", shape);
  });
  const size_t states = state.is_none() ? 0 : c.info.states;
  const size_t count = 1 + kWeights * c.D + states;
  expect_length(needed, count, "needed");
  py::tuple gradients(count);
  size_t next = 0;
  // Stores make() as the next gradient, if its input is present and its gradient needed.
  const auto next_is = [&](bool present, const auto& make) {
    const bool is_needed = present && needed[next].ptr() == Py_True;
    gradients[next++] = is_needed ? make() : py::none();
  };
  next_is(true, [&] { return c.allocate_rows(x, c.I, a.dx); });
  const int64_t gate_size = c.info.gates * c.H;
  for (int64_t d = 0; d < c.D; ++d) {
    const Weights<T>& w = a.weights[d];
    WeightGradients<T>& to = a.dweights[d];
    next_is(true, [&] { return allocate<T>(x, {gate_size, c.I}, to.ih); });
    next_is(true, [&] { return allocate<T>(x, {gate_size, c.P}, to.hh); });
    next_is(w.bias_ih, [&] { return allocate<T>(x, {gate_size}, to.bias_ih); });
    next_is(w.bias_hh, [&] { return allocate<T>(x, {gate_size}, to.bias_hh); });
    next_is(w.hr, [&] { return allocate<T>(x, {c.P, c.H}, to.hr); });
  }
  for (int k = 0; k < static_cast<int>(states); ++k) {
    next_is(true, [&] { return c.allocate_state(x, k, a.dstate[k]); });
  }
  {
    const WithoutGil release(3 * c.flops());
    c.engine.backward(c.cell, a);
  }
  return gradients;
}

// Calls run with a value of the tensor's element type, which every other tensor must have too.
template <class Run>
py::tuple with_type(const Tensor& tensor, const Run& run) {
  return tensor.element() == element_of<double> ? run(double()) : run(float());
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  m.doc() = "The C++ engine of fastrnn; fastrnn.backends.cpp is its only caller.";

  m.def(
      "forward",
      [](const std::string& isa, int cell, int threads, bool deterministic, py::object batch_sizes,
         py::object x, py::tuple weights, py::object state, bool save) {
        const Call c(isa, cell, threads, deterministic, batch_sizes, x, weights);
        return with_type(
            c.x, [&](auto zero) { return forward_as<decltype(zero)>(c, x, weights, state, save); });
      },
      "Run a layer: (out, final, saved), with saved None unless save is true.");

  m.def(
      "backward",
      [](const std::string& isa, int cell, int threads, bool deterministic, py::object batch_sizes,
         py::object x, py::tuple weights, py::object state, py::object out, py::object saved,
         py::object dout, py::object dfinal, py::tuple needed) {
        const Call c(isa, cell, threads, deterministic, batch_sizes, x, weights);
        return with_type(c.x, [&](auto zero) {
          return backward_as<decltype(zero)>(c, x, weights, state, out, saved, dout, dfinal,
                                             needed);
        });
      },
      "The gradients of x, every weight and every state, None where not needed.");

  py::class_<Scratch>(m, "Scratch", py::buffer_protocol(),
                      "Memory that is reused once no reference to it is left.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](Scratch& s) {
        return py::buffer_info(static_cast<uint8_t*>(s.data()), static_cast<py::ssize_t>(s.size()));
      });

  m.def(
      "make_large",
      [](size_t bytes, py::function make) {
        Py_XDECREF(g_make_large);
        g_large = bytes, g_make_large = make.release().ptr();
      },
      py::arg("bytes"), py::arg("make"),
      "Allocate results of this many bytes or more with make(like, *shape).");

  m.def(
      "cells",
      [] {
        py::list all;
        const Engine& engine = *engines().back();
        for (int k = 0; k < engine.cells; ++k) {
          const CellInfo& c = engine.cell[k];
          all.append(py::make_tuple(c.mode, c.gates, c.summed, c.states, c.saved, c.projectable));
        }
        return py::tuple(all);
      },
      "Every cell: (mode, gates, summed, states, saved, projectable).");

  m.def(
      "isas",
      [] {
        py::list names;
        for (const Engine* engine : engines()) {
          if (engine->runs_here()) names.append(engine->name);
        }
        return py::tuple(names);
      },
      "The instruction sets that were compiled in and that this processor supports, best first.");

  m.def("threading", &threading,
        "The name of the threading library that was compiled in, or None.");
  m.def("release", &Scratch::release, "Free the memory that is kept for reuse.");
  m.def("poison", &Scratch::poison, py::arg("on"),
        "Fill scratch memory with NaN before every use, for tests.");
}

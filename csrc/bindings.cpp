// The Python module fastrnn._cpp: every size is checked against what the engine will touch before
// an address is used.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "tensor.h"

using namespace fastrnn;

namespace {

// The sizes that a tensor must have. It may lack leading ones that are 1; with `folded`, only the
// last must be as it is here, and the number of elements.
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
    bool fits = tensor.count() == count && tensor.dimensions() > 0;
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

// The address of a tensor that is written to; it must be contiguous.
template <class T>
T* writable(py::handle object, const char* name, const Shape& shape) {
  const Tensor tensor(object, name);
  if (!tensor.contiguous()) fail(std::string(name) + ": expected a contiguous tensor");
  return address_of<T>(tensor, name, shape);
}

// torch may note a minus sign instead of carrying it out. The question costs as much as all others
// together, and is not asked of weights: only a tensor that was made by torch's private _neg_view
// can be contiguous and negated, or one of a single element.
bool negated(py::handle object) { return call(object, names().is_neg).ptr() == Py_True; }

// The address of a tensor that is read, or of a contiguous copy. The copies live as long as this.
class Readable {
 public:
  template <class T>
  const T* weight(py::handle object, const char* name, const Shape& shape) {
    return object.is_none() ? nullptr : address<T>(object, name, shape, false);
  }

  template <class T>
  const T* address(py::handle object, const char* name, const Shape& shape, bool data = true) {
    const Tensor tensor(object, name);
    // Checked first, so that nothing is copied in vain.
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
      if (!engine->runs_here()) fail("this processor does not run " + name);
      return *engine;
    }
  }
  fail("no engine was compiled for " + name);
}

// Lets other Python threads run, where the work is longer than giving the lock away and taking it.
class WithoutGil {
 public:
  explicit WithoutGil(double flops) {
    if (flops > 2e5) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

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
    Readable readable;
    const int64_t T = Tensor(batch_sizes, "batch_sizes").count();
    return Rows(N, B, readable.address<int64_t>(batch_sizes, "batch_sizes", {{T}}), T);
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
    if (P > INT64_MAX / 16 || H > INT64_MAX / 16) fail("expected sizes that an address can count");
  }

  double flops() const { return 2.0 * D * N * info.gates * H * (I + P); }

  template <class T>
  void fill(Layer<T>& a, const py::tuple& weights, py::handle state, Readable& readable) const {
    a.rows = &rows;
    a.I = I, a.H = H, a.P = P, a.D = static_cast<int>(D), a.threads = threads;
    expect_length(weights, D, "weights");
    const int64_t gate_rows = info.gates * H;
    for (int d = 0; d < D; ++d) {
      const auto w = py::cast<py::tuple>(weights[d]);
      expect_length(w, 5, "weights of a direction");
      Weights<T>& to = a.weights[d];
      to.ih = readable.weight<T>(w[0], "weight_ih", {{gate_rows, I}});
      to.hh = readable.weight<T>(w[1], "weight_hh", {{gate_rows, P}});
      to.bias_ih = readable.weight<T>(w[2], "bias_ih", {{gate_rows}});
      to.bias_hh = readable.weight<T>(w[3], "bias_hh", {{gate_rows}});
      to.hr = readable.weight<T>(w[4], "weight_hr", {{P, H}});
      if (!to.ih || !to.hh) fail("expected weight_ih and weight_hh, got None");
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
    for (int k = 0; k < info.states; ++k) take(k, items[k], Shape{{D, B, k ? H : P}});
  }
};

template <class T>
void forward_as(const Call& c, py::handle x, const py::tuple& weights, py::handle state,
                py::handle out, py::handle final, py::handle saved) {
  Forward<T> a;
  Readable readable;
  c.fill(a, weights, state, readable);
  a.x = readable.address<T>(x, "x", {{c.N, c.I}, true});
  a.out = writable<T>(out, "out", {{c.N, c.D * c.P}, true});
  if (final.is_none()) fail("final: expected a tuple, got None");
  c.states(final, "final", [&](int k, py::handle item, const Shape& shape) {
    a.final[k] = writable<T>(item, "final", shape);
  });
  if (!saved.is_none()) {
    a.saved = writable<T>(saved, "saved", {{c.D, c.N, c.info.kept(a.projected()), c.H}});
  }
  const WithoutGil release(c.flops());
  c.engine.forward(c.cell, a);
}

template <class T>
void backward_as(const Call& c, const py::tuple& weights, py::handle state, py::handle out,
                 py::handle saved, py::handle dout, py::handle dfinal, py::handle dpre,
                 py::handle dbias, py::handle dstate, py::handle dh) {
  Backward<T> a;
  Readable readable;
  c.fill(a, weights, state, readable);
  a.out = readable.address<T>(out, "out", {{c.N, c.D * c.P}, true});
  a.saved = readable.address<T>(saved, "saved", {{c.D, c.N, c.info.kept(a.projected()), c.H}});
  a.dout = readable.optional<T>(dout, "dout", {{c.N, c.D * c.P}, true});
  c.states(dfinal, "dfinal", [&](int k, py::handle item, const Shape& shape) {
    a.dfinal[k] = readable.optional<T>(item, "dfinal", shape);
  });
  a.dpre = writable<T>(dpre, "dpre", {{c.D, c.N, c.info.slots(), c.H}});
  a.dbias = writable<T>(dbias, "dbias", {{c.D, c.info.slots(), c.H}});
  if (dstate.is_none()) fail("dstate: expected a tuple, got None");
  c.states(dstate, "dstate", [&](int k, py::handle item, const Shape& shape) {
    a.dstate[k] = writable<T>(item, "dstate", shape);
  });
  if (a.projected()) a.dh = writable<T>(dh, "dh", {{c.D, c.N, c.P}});
  const WithoutGil release(c.flops());
  c.engine.backward(c.cell, a);
}

Tensor matrix(py::handle object, const char* name) {
  const Tensor tensor(object, name);
  if (tensor.dimensions() != 2) fail(std::string(name) + ": expected a matrix");
  return tensor;
}

// a may have any strides, b and c rows whose elements lie side by side.
template <class T>
void matmul_as(const Engine& engine, int threads, const Tensor& a, const Tensor& b, const Tensor& c,
               bool add) {
  if (a.size(1) != b.size(0) || a.size(0) != c.size(0) || b.size(1) != c.size(1)) {
    fail("expected [M, K] @ [K, N] into [M, N], got " + a.shape() + " @ " + b.shape() + " into " +
         c.shape());
  }
  for (const Tensor* t : {&b, &c}) {
    if (t->stride(1) != 1 && t->size(1) > 1 && t->count()) {
      fail("expected b and c with rows whose elements lie side by side");
    }
  }
  Matmul<T> m;
  m.M = a.size(0), m.N = b.size(1), m.K = a.size(1);
  m.a = a.data<T>(), m.a_row = a.stride(0), m.a_column = a.stride(1);
  m.b = b.data<T>(), m.b_row = b.stride(0);
  m.c = c.data<T>(), m.c_row = c.stride(0);
  m.add = add;
  m.threads = set_threads(threads);
  const WithoutGil release(2.0 * m.M * m.N * m.K);
  engine.matmul(m);
}

// The type of this tensor is the one that every other must have.
template <class Run>
void with_type(const Tensor& tensor, const Run& run) {
  if (tensor.element() == element_of<double>) {
    run(double());
  } else {
    run(float());
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
        with_type(Tensor(x, "x"), [&](auto zero) {
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
        with_type(Tensor(out, "out"), [&](auto zero) {
          backward_as<decltype(zero)>(c, weights, state, out, saved, dout, dfinal, dpre, dbias,
                                      dstate, dh);
        });
      },
      "Run a layer in reverse. Writes dpre, dbias, dstate and, if projected, dh.");

  m.def(
      "matmul",
      [](const std::string& isa, int threads, py::object a_, py::object b_, py::object c_,
         bool add) {
        const Engine& engine = engine_named(isa);
        for (py::object* t : {&a_, &b_}) {
          if (negated(*t)) *t = call(*t, names().resolve_neg);
        }
        const Tensor a = matrix(a_, "a"), b = matrix(b_, "b"), c = matrix(c_, "c");
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
  m.def("release", &Scratch::release, "Give back the memory that is kept for reuse.");
  m.def("poison", &Scratch::poison, py::arg("on"),
        "Fill scratch memory with NaN before every use, for tests.");
}

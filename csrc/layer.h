// The arguments of one layer: its weights and state, and the buffers of the forward and of the
// backward pass.
//
// Sizes: T steps, N rows in total, B rows in the widest step, D directions, I inputs, H hidden
// units, P size of h (H unless projected), G gates, S pre-activations of a unit (see
// src/fastrnn/cells.py).
#pragma once

#include <cstdint>

#include "rows.h"

namespace fastrnn {

constexpr int kMaxStates = 4;
constexpr int kMaxDirections = 2;

// The weights of one direction, row-major; null where the layer has none.
template <class T>
struct Weights {
  const T* ih = nullptr;       // [G*H, I]
  const T* hh = nullptr;       // [G*H, P]
  const T* bias_ih = nullptr;  // [G*H]
  const T* bias_hh = nullptr;  // [G*H]
  const T* hr = nullptr;       // [P, H]
};

template <class T>
struct Layer {
  const Rows* rows = nullptr;
  int64_t I = 0, H = 0, P = 0;
  int D = 1;
  int threads = 1;
  bool deterministic = false;  // sums depend neither on the load of the cores nor on the row count
  Weights<T> weights[kMaxDirections];
  const T* state[kMaxStates] = {};  // h [D, B, P], others [D, B, H]; null is zero

  bool projected() const { return weights[0].hr != nullptr; }
};

template <class T>
struct Forward : Layer<T> {
  const T* x = nullptr;       // [N, I]
  T* out = nullptr;           // [N, D*P]
  T* final[kMaxStates] = {};  // shapes of state
  T* saved = nullptr;  // [D, N, num_saved, H]: v, s[1:], h_cell if projected; null: save nothing
};

template <class T>
struct WeightGradients {
  T *ih = nullptr, *hh = nullptr, *bias_ih = nullptr, *bias_hh = nullptr, *hr = nullptr;
};

template <class T>
struct Backward : Layer<T> {
  const T* x = nullptr;              // [N, I]
  const T* out = nullptr;            // [N, D*P]
  const T* saved = nullptr;          // [D, N, num_saved, H]
  const T* dout = nullptr;           // [N, D*P]; null is zero
  const T* dfinal[kMaxStates] = {};  // shapes of state; null is zero
  // Results. Each has the shape of the tensor it is the gradient of; null where it is not needed.
  T* dx = nullptr;
  WeightGradients<T> dweights[kMaxDirections];
  T* dstate[kMaxStates] = {};
};

}  // namespace fastrnn

// The engine's entry points: one table of functions for each instruction set that was compiled in,
// and the sizes of its cells.
#pragma once

#include <vector>

#include "layer.h"

namespace fastrnn {

// The sizes of a cell that the drivers and the argument checks depend on.
struct CellInfo {
  const char* mode;
  int gates, summed, states, saved;
  bool projectable;

  constexpr int num_preacts() const { return 2 * gates - summed; }
  constexpr int num_saved(bool projected) const { return saved + states - 1 + (projected ? 1 : 0); }
};

// The engine compiled for one instruction set.
struct Engine {
  const char* name;
  bool (*runs_here)();
  int cells;
  const CellInfo* cell;  // [cells]
  void (*forward_f32)(int cell, const Forward<float>&);
  void (*forward_f64)(int cell, const Forward<double>&);
  void (*backward_f32)(int cell, const Backward<float>&);
  void (*backward_f64)(int cell, const Backward<double>&);

  void forward(int c, const Forward<float>& a) const { forward_f32(c, a); }
  void forward(int c, const Forward<double>& a) const { forward_f64(c, a); }
  void backward(int c, const Backward<float>& a) const { backward_f32(c, a); }
  void backward(int c, const Backward<double>& a) const { backward_f64(c, a); }
};

// The engines of this build, best first.
const std::vector<const Engine*>& engines();

}  // namespace fastrnn

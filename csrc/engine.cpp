// Compiles the engine for every instruction set: isa.h includes its source once for each.
#include "engine.h"

#include "isa.h"

namespace fastrnn {

const std::vector<const Engine*>& engines() {
  static const std::vector<const Engine*> all = {FASTRNN_ENGINES};
  return all;
}

}  // namespace fastrnn

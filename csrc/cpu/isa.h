// The instruction sets the CPU kernels were compiled for, and which of them this machine can run.
//
// They are compiled from one source, kernels.inc, each in a namespace of its own. That source uses nothing inline of the standard
// library, of which the linker would keep one copy for all: if that were the one compiled for AVX-512, it would crash where there
// is none.
#pragma once

#include <vector>

#include "kernels.h"

namespace bupo::cpu {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels& (*kernels)();
};

// Returns the instruction sets, the fastest first; "portable" is always there, and last.
const std::vector<Isa>& isas();

}  // namespace bupo::cpu

// The instruction sets the CPU kernels were compiled for, and which of them this machine can run.
//
// All of them are one source, kernels.inc, in a namespace of their own each. A file of an instruction set uses nothing inline of the
// standard library that the linker could share with the others: a copy compiled for AVX-512 would crash where there is none.
#pragma once

#include <vector>

#include "kernels.h"

namespace bupo::cpu {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels& (*kernels)();
};

// The fastest first; "portable" is always there, and last.
const std::vector<Isa>& isas();

}  // namespace bupo::cpu

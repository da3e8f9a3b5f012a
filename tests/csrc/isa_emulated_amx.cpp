#define BUPO_ISA emulated_amx
#define __AMX_BF16__ 1
#include "../emulation/x86_emulation.h"
#include "cpu/kernels.inc"

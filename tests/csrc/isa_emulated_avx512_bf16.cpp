#define BUPO_ISA emulated_avx512_bf16
#define __AVX512BF16__ 1
#include "../emulation/x86_emulation.h"
#include "cpu/kernels.inc"

#define BUPO_ISA avx512_bf16
#include "kernels.inc"

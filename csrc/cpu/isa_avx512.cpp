#define BUPO_ISA avx512
#include "kernels.inc"

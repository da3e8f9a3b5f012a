#define BUPO_ISA avx2
#include "kernels.inc"

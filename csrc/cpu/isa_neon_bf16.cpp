#define BUPO_ISA neon_bf16
#define BUPO_NEON
#include "kernels.inc"

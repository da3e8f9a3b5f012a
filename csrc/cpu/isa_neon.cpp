#define BUPO_ISA neon
#define BUPO_NEON  // which every aarch64 has: no flag of the compiler says so
#include "kernels.inc"

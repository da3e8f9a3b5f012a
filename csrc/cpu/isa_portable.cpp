#define BUPO_ISA portable
#include "kernels.inc"

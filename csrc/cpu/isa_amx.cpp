#define BUPO_ISA amx
#include "kernels.inc"

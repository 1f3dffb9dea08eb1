#define DFT_ISA avx512
#include "rows.inc"

#define DFT_ISA avx2
#include "rows.inc"

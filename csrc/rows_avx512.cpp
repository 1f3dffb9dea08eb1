#define DFT_ISA avx512
#include "rows_cpu.inc"

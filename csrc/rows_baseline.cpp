#define DFT_ISA baseline
#include "rows_cpu.inc"

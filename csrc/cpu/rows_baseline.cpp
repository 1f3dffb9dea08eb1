#define DFT_ISA baseline
#include "rows.inc"

/* AVX2 with AVX-VNNI: a product of bytes is one instruction. */
#define VNNI
#include "avx2.c"

/* AVX-512 with AMX: several tokens go through its matrix registers. */
#define AMX
#include "avx512.c"

/* AVX-512 with AMX: matrix registers multiply several tokens at once. */
#define AMX
#include "avx512.c"

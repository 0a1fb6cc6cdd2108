/* Select the kernels of this processor, and compute complete products on one thread. */
#include "matrix.h"
#include <stdlib.h>
#include <string.h>

static const SqftKernels *const all[] = {
#if defined(__x86_64__)
    &sqft_amx, &sqft_avx512, &sqft_avx2_vnni, &sqft_avx2,
#elif defined(__aarch64__)
    &sqft_neon,
#endif
    &sqft_plain,
};

const SqftKernels *sqft_kernels(const char *name) {
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if ((!name || !strcmp(name, all[i]->name)) && all[i]->here()) return all[i];
  return 0;
}

enum { AUTO, ONE, MANY, EXACT };

int sqft_multiply(const char *name, const SqftMatrix *m, const float *x, size_t tokens, float *y,
                  int mode) {
  const SqftKernels *kernels = sqft_kernels(name);
  if (mode == EXACT) {
    sqft_exact(m, x, tokens, y, 0, m->tiles);
    return 0;
  }
  if (!kernels) return -1;
  const int together = mode == MANY || (mode == AUTO && tokens > 1);
  const size_t at_once = together ? tokens : 1;
  SqftInputs rounded = {malloc(sqft_code_bytes(m, at_once)),
                        malloc(at_once * m->groups * sizeof(float)),
                        malloc(at_once * m->groups * sizeof(int32_t))};
  uint8_t *scratch = malloc(kernels->scratch_bytes(m, at_once));
  const int lacking = !rounded.codes || !rounded.scale || !rounded.sum || !scratch;
  for (size_t t = 0; !lacking && t < tokens; t++) {
    kernels->round(m, x + t * m->inputs, together ? t : 0, at_once, &rounded);
    if (!together) kernels->one(m, &rounded, y + t * m->rows, 0, m->tiles);
  }
  if (!lacking && together) kernels->many(m, &rounded, tokens, y, 0, m->tiles, scratch);
  free(rounded.codes), free(rounded.scale), free(rounded.sum), free(scratch);
  return lacking ? -1 : 0;
}

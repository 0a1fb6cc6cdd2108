/* Which kernels run here, and whole products on one thread. */
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
  size_t codes = (size_t)m->groups * m->span;
  SqftInputs rounded = {malloc(tokens * codes), malloc(tokens * m->groups * sizeof(float)),
                        malloc(tokens * m->groups * sizeof(int32_t))};
  uint8_t *wide = malloc(sqft_wide_bytes(m));
  int lacking = !kernels || !rounded.codes || !rounded.scale || !rounded.sum || !wide;
  for (size_t t = 0; !lacking && t < tokens; t++) {
    SqftInputs one = sqft_from_token(m, &rounded, t);
    kernels->round(m, x + t * m->inputs, &one);
    if (mode == ONE || (mode == AUTO && tokens == 1))
      kernels->one(m, &one, y + t * m->rows, 0, m->tiles);
  }
  if (!lacking && (mode == MANY || (mode == AUTO && tokens > 1)))
    kernels->many(m, &rounded, tokens, y, 0, m->tiles, wide);
  free(rounded.codes), free(rounded.scale), free(rounded.sum), free(wide);
  return lacking ? -1 : 0;
}

/* Every format and many shapes on the kernels named on the command line, in buffers of exactly the
   bytes they need, against sums in double. For AddressSanitizer and for other machines' processors.
   Exits with 1 and says where the first difference is. */
#include "matrix.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state = 1;
static uint32_t draw(uint32_t below) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)(state >> 33) % below;
}

static uint16_t half_of(int exponent, uint32_t fraction) {
  return (uint16_t)((exponent + 15) << 10 | fraction);
}

enum { TOKENS = 37, SOME = 13, FEW = 3 }; /* more than 32 where they go together */

static int try(const SqftKernels *kernels, uint32_t bits, int asymmetric, uint32_t rows,
               uint32_t inputs, uint32_t group, uint32_t format, int thousandth) {
  const uint32_t groups = inputs / group, middle = 1u << (bits - 1);
  const size_t count = (size_t)rows * inputs;
  uint8_t *codes = malloc(count), *stored = calloc((count * bits + 7) / 8, 1);
  uint8_t *zero = malloc((size_t)rows * groups);
  uint16_t *scale = malloc(2 * (size_t)rows * groups);
  for (size_t i = 0; i < (size_t)rows * groups; i++) {
    zero[i] = (uint8_t)(asymmetric ? draw(1u << bits) : middle);
    scale[i] = half_of(-8, draw(1024));
  }
  for (size_t i = 0; i < count; i++) {
    uint8_t z = zero[i / inputs * groups + i % inputs / group];
    int kept = format == SQFT_PAIRS ? i % 4 == 1 || i % 4 == 2 : (int)draw(1000) < thousandth;
    codes[i] = kept ? (uint8_t)draw(1u << bits) : z;
    if (bits == 8) stored[i] = codes[i];
    else stored[i / 2] |= (uint8_t)(codes[i] << i % 2 * 4);
  }
  uint32_t *kept = malloc(4 * (size_t)rows);
  const uint8_t *zeros = asymmetric ? zero : 0;
  sqft_count(stored, bits, 0, zeros, rows, inputs, group, kept);
  SqftMatrix plan = {.format = format, .bits = bits, .lanes = kernels->lanes, .rows = rows,
                     .asymmetric = (uint32_t)asymmetric, .inputs = inputs, .stored_group = group};
  if (sqft_plan(&plan, kept)) return 1;
  SqftMatrix *m = aligned_alloc(64, (plan.bytes + 63) / 64 * 64);
  memcpy(m, &plan, sizeof plan);
  sqft_place(m, kept);
  sqft_pack(m, stored, 0, zeros, scale, 0, m->tiles);
  sqft_seal(m);
  if (sqft_check(m, m->bytes) || !sqft_check(m, m->bytes - 1)) return 1;
  float *x = malloc(TOKENS * (size_t)inputs * 4), *y = malloc(TOKENS * (size_t)rows * 4);
  for (size_t i = 0; i < TOKENS * (size_t)inputs; i++) x[i] = (float)draw(2001) / 1000.f - 1.f;
  const size_t span = (size_t)m->groups * m->span;
  const size_t tokens = inputs > 1000 ? FEW : kernels->lanes < 16 ? SOME : TOKENS;
  SqftInputs all = {malloc(TOKENS * span), malloc(TOKENS * 4 * (size_t)m->groups),
                    malloc(TOKENS * 4 * (size_t)m->groups)};
  SqftInputs together = {malloc(sqft_code_bytes(m, tokens)), malloc(tokens * 4 * (size_t)m->groups),
                         malloc(tokens * 4 * (size_t)m->groups)};
  uint8_t *scratch = malloc(kernels->scratch_bytes(m, tokens));
  int wrong = 0;
  for (int mode = 0; mode < 2 && !wrong; mode++) {
    for (size_t t = 0; t < tokens; t++) {
      SqftInputs one = {all.codes + t * span, all.scale + t * m->groups, all.sum + t * m->groups};
      if (mode) kernels->round(m, x + t * inputs, t, tokens, &together);
      else kernels->round(m, x + t * inputs, 0, 1, &one);
      if (!mode) kernels->one(m, &one, y + t * rows, 0, m->tiles);
    }
    if (mode) kernels->many(m, &together, tokens, y, 0, m->tiles, scratch);
    for (size_t t = 0; t < tokens && !wrong; t++)
      for (uint32_t r = 0; r < rows && !wrong; r++) {
        double sum = 0, size = 1e-30;
        for (uint32_t i = 0; i < inputs; i++) {
          uint32_t g = i / m->group, at = r * groups + i / group;
          double s = ldexp(1 + (scale[at] & 1023) / 1024., (scale[at] >> 10) - 15);
          double product = s * (codes[(size_t)r * inputs + i] - zero[at]) *
                           all.codes[t * span + g * m->span + i % m->group] *
                           (double)all.scale[t * m->groups + g];
          sum += product, size += fabs(product);
        }
        if (fabs(sum - y[t * rows + r]) > 2e-6 * size) wrong = 1;
      }
  }
  uint8_t *back = malloc(count);
  sqft_unpack(m, back, zero, scale);
  if (memcmp(back, codes, count)) wrong = 1;
  free(back), free(codes), free(stored), free(zero), free(scale), free(kept), free(m), free(x);
  free(y), free(all.codes), free(all.scale), free(all.sum);
  free(together.codes), free(together.scale), free(together.sum), free(scratch);
  if (wrong)
    printf("%s: INT%u, asymmetric %d, %u x %u, group %u, format %u, %d / 1000 kept\n",
           kernels->name, bits, asymmetric, rows, inputs, group, format, thousandth);
  return wrong;
}

int main(int count, char **names) {
  const uint32_t shapes[][3] = {{1, 4, 4},     {33, 128, 16},  {16, 64, 64},   {7, 48, 48},
                                {70, 256, 128}, {3, 30, 30},   {5, 192, 192},  {64, 384, 32},
                                {2, 4096, 4096}, {31, 66, 33}};
  const int kept[] = {0, 20, 250, 500, 900, 1000};
  int tried = 0;
  for (int n = 1; n < count; n++) {
    const SqftKernels *kernels = sqft_kernels(names[n]);
    if (!kernels) {
      printf("%s: not here\n", names[n]);
      return 1;
    }
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
      for (uint32_t bits = 4; bits <= 8; bits += 4)
        for (int asymmetric = 0; asymmetric < 2; asymmetric++)
          for (uint32_t format = 0; format < 3; format++)
            for (size_t k = 0; k < sizeof kept / sizeof *kept; k++, tried++) {
              if (format == SQFT_PAIRS && shapes[s][2] % 4) continue;
              if (try(kernels, bits, asymmetric, shapes[s][0], shapes[s][1], shapes[s][2], format,
                      kept[k]))
                return 1;
            }
  }
  printf("%d cases\n", tried);
  return 0;
}

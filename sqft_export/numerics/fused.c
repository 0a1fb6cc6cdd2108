/* Compute the effective weight of an adapted Linear and its gradients in one pass over memory.
   The result has the same bits as the torch code in fused.py. The order of operations is the same,
   the compiler fuses no multiply-add, divisions stay divisions, and rounding is half to even. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { F32, F16, BF16 };
enum { PIECE = 256, ROWS = 16 };

/* The class _Work in fused.py has the same fields. Matrices are [rows, inputs], row-major; an
   optional matrix is 0 if it is missing. */
typedef struct {
  const void *weight;
  const float *update;      /* B A */
  const uint8_t *mask;      /* one bit per weight, lowest bit first; each row starts on a byte */
  const float *scale;       /* [rows, inputs / group] */
  const uint8_t *zero;
  void *effective;          /* can be the same memory as `update` */
  const void *gradient;     /* gradient of the effective weight */
  float *update_gradient;   /* can be the same memory as `gradient` */
  float *scale_gradient;    /* one term per weight; can be the same memory as `update` */
  size_t rows, inputs, group;
  float scaling, highest;
  int32_t weight_kind, effective_kind, gradient_kind;
  size_t next;              /* first row that no thread has taken yet */
} Work;

static inline float of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline void to_floats(const void *from, int kind, size_t at, size_t count, float *out) {
  if (kind == F32) {
    memcpy(out, (const float *)from + at, count * sizeof *out);
  } else if (kind == BF16) {
    for (size_t i = 0; i < count; i++) out[i] = of_bits((uint32_t)((const uint16_t *)from)[at + i] << 16);
  } else {
    for (size_t i = 0; i < count; i++) {
      uint32_t half = ((const uint16_t *)from)[at + i], sign = half >> 15 << 31;
      float value = of_bits((half & 0x7fff) << 13) * 5.192296858534828e33f; /* 2^112 */
      out[i] = of_bits((value >= 65536 ? 0x7f800000u : 0) | sign) + value * (sign ? -1 : 1);
    }
  }
}

static inline void from_floats(const float *from, int kind, size_t at, size_t count, void *out) {
  if (kind == F32) {
    memcpy((float *)out + at, from, count * sizeof *from);
    return;
  }
  for (size_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, from + i, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ((uint16_t *)out)[at + i] = from[i] != from[i] ? 0x7fc0 : (uint16_t)bits;
  }
}

/* Process columns `first` to `first + count` of a row. They are within one group, and `first` is a
   multiple of 8. */
static inline void piece(const Work *w, size_t row, size_t first, size_t count) {
  float weight[PIECE], kept[PIECE + 8], value[PIECE], inside[PIECE];
  const size_t at = row * w->inputs + first;
  to_floats(w->weight, w->weight_kind, at, count, weight);
  for (size_t i = 0; i < count; i++) kept[i] = inside[i] = 1;
  if (w->mask) {
    const uint8_t *bits = w->mask + row * ((w->inputs + 7) / 8) + first / 8;
    for (size_t byte = 0; byte * 8 < count; byte++)
      for (int i = 0; i < 8; i++) kept[8 * byte + i] = (float)(bits[byte] >> i & 1);
  }
  memcpy(value, weight, count * sizeof *value);
  if (w->update)
    for (size_t i = 0; i < count; i++)
      value[i] = w->update[at + i] * w->scaling * kept[i] + weight[i];
  float *effective = value, on_grid[PIECE];
  if (w->scale) {
    const size_t group = row * (w->inputs / w->group) + first / w->group;
    const float scale = w->scale[group], low = -(float)w->zero[group], high = w->highest + low;
    for (size_t i = 0; i < count; i++) {
      float steps = rintf(value[i] / scale), nearest = steps;
      nearest = nearest < low ? low : nearest;
      nearest = nearest > high ? high : nearest;
      inside[i] = steps == nearest ? 1 : 0;
      on_grid[i] = nearest * scale;
    }
    effective = on_grid;
  }
  if (w->gradient) {
    float gradient[PIECE];
    to_floats(w->gradient, w->gradient_kind, at, count, gradient);
    if (w->scale_gradient)
      for (size_t i = 0; i < count; i++)
        w->scale_gradient[at + i] = gradient[i] * (effective[i] - value[i] * inside[i]);
    for (size_t i = 0; i < count; i++) w->update_gradient[at + i] = gradient[i] * inside[i] * kept[i];
  }
  from_floats(effective, w->effective_kind, at, count, w->effective);
}

#if defined(__x86_64__) && defined(__gnu_linux__)
__attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#endif
static void rows(const Work *w, size_t first, size_t last) {
  const size_t group = w->scale ? w->group : w->inputs;
  for (size_t row = first; row < last; row++)
    for (size_t start = 0; start < w->inputs; start += group)
      for (size_t at = 0; at < group; at += PIECE)
        piece(w, row, start + at, group - at < PIECE ? group - at : PIECE);
}

static void share(void *data) {
  Work *w = data;
  for (;;) {
    size_t first = __atomic_fetch_add(&w->next, ROWS, __ATOMIC_RELAXED);
    if (first >= w->rows) return;
    rows(w, first, first + ROWS < w->rows ? first + ROWS : w->rows);
  }
}

/* parallel: GOMP_parallel of the OpenMP library that torch uses, or 0 to run on one thread. */
void sqft_fused(Work *w, void (*parallel)(void (*)(void *), void *, unsigned, unsigned),
                unsigned threads) {
  w->next = 0;
  if (parallel && threads > 1)
    parallel(share, w, threads, 0);
  else
    share(w);
}

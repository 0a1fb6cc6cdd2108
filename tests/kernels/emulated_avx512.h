/* The AVX-512 instructions that sqft_export/kernels/avx512.c uses, in plain C, so that it is tested
   on machines without them: what each does by Intel's documentation, element by element. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint8_t b[16]; } __m128i;
typedef struct { uint8_t b[32]; } __m256i;
typedef struct { uint8_t b[64]; } __m512i;
typedef struct { float f[16]; } __m512;
typedef uint64_t __mmask64;

#define FN(T, name, args, ...) static inline T name args { __VA_ARGS__ }
#define B(n) for (int k = 0; k < (n); k++)
static inline int32_t lane_of(__m512i v, int k) { int32_t x; memcpy(&x, v.b + 4 * k, 4); return x; }
static inline void set_lane(__m512i *v, int k, int64_t x) {
  uint32_t u = (uint32_t)x; memcpy(v->b + 4 * k, &u, 4);
}
#define LANEWISE(name, expr) FN(__m512i, name, (__m512i a, __m512i b), \
  B(16) { int64_t x = lane_of(a, k), y = lane_of(b, k); set_lane(&a, k, (expr)); } return a;)
#define BYTEWISE(name, expr) FN(__m512i, name, (__m512i a, __m512i b), \
  B(64) { uint8_t x = a.b[k], y = b.b[k]; a.b[k] = (uint8_t)(expr); } return a;)

FN(__m128i, _mm_loadu_si128, (const __m128i *p), __m128i v; memcpy(&v, p, 16); return v;)
FN(__m256i, _mm256_loadu_si256, (const __m256i *p), __m256i v; memcpy(&v, p, 32); return v;)
FN(__m512i, _mm512_loadu_si512, (const void *p), __m512i v; memcpy(&v, p, 64); return v;)
FN(void, _mm512_storeu_si512, (void *p, __m512i v), memcpy(p, &v, 64);)
/* the upper half is undefined: something that would be noticed */
FN(__m512i, _mm512_castsi256_si512, (__m256i v), __m512i w; memset(&w, 0xA5, 64);
   memcpy(&w, &v, 32); return w;)
FN(__m512i, _mm512_set1_epi8, (char x), __m512i v; memset(&v, x, 64); return v;)
FN(__m512i, _mm512_set1_epi32, (int x), __m512i v; B(16) set_lane(&v, k, x); return v;)
FN(__m512i, _mm512_set4_epi32, (int d, int c, int b, int a), int x[4] = {a, b, c, d}; __m512i v;
   B(16) set_lane(&v, k, x[k % 4]); return v;)
FN(__m512i, _mm512_broadcast_i32x4, (__m128i x), __m512i v; B(4) memcpy(v.b + 16 * k, &x, 16);
   return v;)
BYTEWISE(_mm512_and_si512, x & y)
BYTEWISE(_mm512_or_si512, x | y)
BYTEWISE(_mm512_andnot_si512, ~x & y)
BYTEWISE(_mm512_add_epi8, x + y)
LANEWISE(_mm512_add_epi32, x + y)
LANEWISE(_mm512_sub_epi32, x - y)
LANEWISE(_mm512_mullo_epi32, x * y)
FN(__mmask64, _mm512_cmpeq_epi8_mask, (__m512i a, __m512i b), __mmask64 m = 0;
   B(64) m |= (__mmask64)(a.b[k] == b.b[k]) << k; return m;)
FN(__m512i, _mm512_movm_epi8, (__mmask64 m), __m512i v; B(64) v.b[k] = m >> k & 1 ? 255 : 0;
   return v;)
FN(__m512i, _mm512_srli_epi16, (__m512i a, unsigned n), B(32) { uint16_t x; memcpy(&x, a.b + 2 * k, 2);
   x = (uint16_t)(x >> n); memcpy(a.b + 2 * k, &x, 2); } return a;)
FN(__m512i, _mm512_slli_epi16, (__m512i a, unsigned n), B(32) { uint16_t x; memcpy(&x, a.b + 2 * k, 2);
   x = (uint16_t)(x << n); memcpy(a.b + 2 * k, &x, 2); } return a;)
FN(__m512i, _mm512_slli_epi32, (__m512i a, unsigned n),
   B(16) set_lane(&a, k, (int64_t)((uint32_t)lane_of(a, k) << n)); return a;)
FN(__m512i, _mm512_shuffle_epi8, (__m512i a, __m512i at), __m512i v;
   B(64) v.b[k] = at.b[k] & 128 ? 0 : a.b[(k & 48) + (at.b[k] & 15)]; return v;)
FN(__m512i, _mm512_cvtepu8_epi32, (__m128i a), __m512i v; B(16) set_lane(&v, k, a.b[k]); return v;)
FN(__m512i, _mm512_dpbusd_epi32, (__m512i c, __m512i u, __m512i s), B(16) {
   int64_t sum = lane_of(c, k);
   for (int j = 0; j < 4; j++) sum += (int)u.b[4 * k + j] * (int8_t)s.b[4 * k + j];
   set_lane(&c, k, sum); } return c;)
FN(__m512i, _mm512_mask_expand_epi8, (__m512i src, __mmask64 m, __m512i a), int next = 0;
   B(64) if (m >> k & 1) src.b[k] = a.b[next++]; return src;)
FN(__m512, _mm512_set1_ps, (float x), __m512 v; B(16) v.f[k] = x; return v;)
FN(__m512, _mm512_cvtepi32_ps, (__m512i a), __m512 v; B(16) v.f[k] = (float)lane_of(a, k); return v;)
FN(__m512, _mm512_mul_ps, (__m512 a, __m512 b), B(16) a.f[k] *= b.f[k]; return a;)
FN(__m512, _mm512_fmadd_ps, (__m512 a, __m512 b, __m512 c),
   B(16) c.f[k] = fmaf(a.f[k], b.f[k], c.f[k]); return c;)
FN(__m512, _mm512_cvtph_ps, (__m256i a), __m512 v; B(16) { uint16_t h; memcpy(&h, a.b + 2 * k, 2);
   _Float16 x; memcpy(&x, &h, 2); v.f[k] = (float)x; } return v;)
FN(void, _mm512_storeu_ps, (float *p, __m512 v), memcpy(p, &v, 64);)
#undef B
#undef FN

/* Plain C: the reference, and the fallback for all processors. It defines the meaning of each
   primitive that products.h uses. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define HIGH 1
#define SIGNED8 0
#define FLUSH 64
#define NARROW_READS 0
#define TOKENS 4

typedef struct { uint8_t b[4 * LANES]; } V;
typedef struct { int32_t i[LANES]; } I;
typedef struct { float f[LANES]; } F;
typedef I A;

#define EACH(n) for (int k = 0; k < (n); k++)
#define MAKE(T, ...) static inline T { __VA_ARGS__ }

MAKE(V v_load(const void *p), V v; memcpy(&v, p, sizeof v); return v;)
MAKE(void v_store(void *p, V v), memcpy(p, &v, sizeof v);)
MAKE(V v_set(int x), V v; memset(&v, x, sizeof v); return v;)
MAKE(V v_one(void), return v_set(1);)
MAKE(V v_low(V v), EACH(32) v.b[k] &= 15; return v;)
MAKE(V v_high(V v), EACH(32) v.b[k] = (uint8_t)(v.b[k] >> 4); return v;)
/* divide the result of v_high by HIGH */
MAKE(V v_plain(V v), return v;)
/* repeat 4 activations in every lane */
MAKE(V v_four(const int8_t *q), V v; EACH(LANES) memcpy(v.b + 4 * k, q, 4); return v;)
/* repeat 16 activations in every 16 bytes */
MAKE(V v_sixteen(const void *q), V v; memcpy(v.b, q, 16); memcpy(v.b + 16, q, 16); return v;)
/* extract 2 bits of an index: a position in its 4 inputs */
MAKE(V v_place(V v, int field), EACH(32) v.b[k] = v.b[k] >> 2 * field & 3; return v;)
/* convert to a position in 16 activations: in the first 8 for fields 0 and 2, else in the last */
MAKE(V v_index(V v, int field), v = v_place(v, field);
     EACH(32) v.b[k] = (uint8_t)(v.b[k] + 8 * (field & 1) + (k & 2) * 2); return v;)
/* select bytes by index within each 16 bytes */
MAKE(V v_pick(V x, V at), V v; EACH(32) v.b[k] = x.b[(k & 16) + (at.b[k] & 15)]; return v;)
/* the indices of byte j of every lane */
MAKE(V v_spread(int j), V v; EACH(32) v.b[k] = (uint8_t)((k & 12) + j); return v;)
/* 0 1 2 3 in every lane */
MAKE(V v_count(void), V v; EACH(32) v.b[k] = k & 3; return v;)
MAKE(V v_equal(V a, V b), EACH(32) a.b[k] = a.b[k] == b.b[k] ? 255 : 0; return a;)
MAKE(V v_and(V a, V b), EACH(32) a.b[k] &= b.b[k]; return a;)
MAKE(V v_or(V a, V b), EACH(32) a.b[k] |= b.b[k]; return a;)
MAKE(V v_not_and(V a, V b), EACH(32) a.b[k] = (uint8_t)(~a.b[k] & b.b[k]); return a;)
/* repeat one zero point per lane 4 times */
MAKE(V v_zero(const uint8_t *p), V v; EACH(32) v.b[k] = p[k / 4]; return v;)
MAKE(I i_set(int x), I i; EACH(LANES) i.i[k] = x; return i;)
MAKE(I i_bytes(const uint8_t *p), I i; EACH(LANES) i.i[k] = p[k]; return i;)
MAKE(I i_add(I a, I b), EACH(LANES) a.i[k] += b.i[k]; return a;)
MAKE(I i_sub(I a, I b), EACH(LANES) a.i[k] -= b.i[k]; return a;)
MAKE(I i_mul(I a, I b), EACH(LANES) a.i[k] *= b.i[k]; return a;)
/* multiply by HIGH */
MAKE(I i_high(I a), return a;)
/* c + codes (unsigned) * activations (signed), summed over the 4 of each lane */
MAKE(I i_dot8(I c, V u, V q),
     EACH(32) c.i[k / 4] += (int32_t)u.b[k] * (int8_t)q.b[k]; return c;)
/* the same for nibbles; a_total adds such a sum to a total */
MAKE(A a_zero(void), return i_set(0);)
MAKE(A a_dot(A a, V u, V q), return i_dot8(a, u, q);)
MAKE(I a_total(I total, A a), return i_add(total, a);)
MAKE(F f_set(float x), F f; EACH(LANES) f.f[k] = x; return f;)
MAKE(F f_zero(void), return f_set(0);)
MAKE(F f_of(I i), F f; EACH(LANES) f.f[k] = (float)i.i[k]; return f;)
MAKE(F f_mul(F a, F b), EACH(LANES) a.f[k] *= b.f[k]; return a;)
MAKE(F f_fma(F a, F b, F c), EACH(LANES) c.f[k] += a.f[k] * b.f[k]; return c;)
MAKE(void f_store(float *p, F f), memcpy(p, &f, sizeof f);)

/* convert one float16 per lane */
static inline F f_half(const uint8_t *p) {
  F f;
  EACH(LANES) {
    uint32_t h = p[2 * k] | (uint32_t)p[2 * k + 1] << 8, e = h >> 10 & 31, m = h & 1023, bits;
    if (e == 0) {
      f.f[k] = (float)m * 5.9604644775390625e-8f; /* 2^-24 */
      if (h >> 15) f.f[k] = -f.f[k];
      continue;
    }
    bits = (h >> 15) << 31 | (e == 31 ? 255u : e + 112) << 23 | m << 13;
    memcpy(&f.f[k], &bits, 4);
  }
  return f;
}

/* Put kept codes where the mask has a bit, and the zero point elsewhere. Codes of vector 1 are the
   high nibbles and are left multiplied by HIGH. narrow: half a vector holds all kept codes. */
static inline void expand4(const uint8_t *mask, const uint8_t **kept, int narrow, V z0, V z1,
                           V *o0, V *o1) {
  (void)narrow;
  EACH(32) if (mask[k / 8] >> k % 8 & 1) z0.b[k] = *kept[0]++ & 15;
  EACH(32) if (mask[4 + k / 8] >> k % 8 & 1) z1.b[k] = *kept[1]++ >> 4;
  *o0 = z0, *o1 = z1;
}

static inline void expand8(const uint8_t *mask, const uint8_t **kept, V z0, V z1, V *o0, V *o1) {
  EACH(32) if (mask[k / 8] >> k % 8 & 1) z0.b[k] = *kept[0]++;
  EACH(32) if (mask[4 + k / 8] >> k % 8 & 1) z1.b[k] = *kept[0]++;
  *o0 = z0, *o1 = z1;
}

#include "products.h"

static int here(void) { return 1; }
const SqftKernels sqft_plain = {"plain", LANES, here, rounded, one, many, scratch_bytes};

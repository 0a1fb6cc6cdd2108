/* NEON with the dot product instructions of ARMv8.2. */
#if defined(__aarch64__)
#ifdef __clang__
#define TARGET "dotprod"
#else
#define TARGET "arch=armv8.2-a+dotprod"
#endif
#include "begin_target.h"
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>
#ifndef __APPLE__
#include <sys/auxv.h>
#endif

#define LANES 4
#define HIGH 1
#define SIGNED8 1
#define FLUSH 64
#define NARROW_READS 0
#define TOKENS 8
#define MAKE(T, ...) static inline T { __VA_ARGS__ }

typedef uint8x16_t V;
typedef int32x4_t I;
typedef int32x4_t A;
typedef float32x4_t F;

#define S(v) vreinterpretq_s8_u8(v)
MAKE(V v_load(const void *p), return vld1q_u8(p);)
MAKE(void v_store(void *p, V v), vst1q_u8(p, v);)
MAKE(V v_set(int x), return vdupq_n_u8((uint8_t)x);)
MAKE(V v_one(void), return v_set(1);)
MAKE(V v_low(V v), return vandq_u8(v, v_set(15));)
MAKE(V v_high(V v), return vshrq_n_u8(v, 4);)
MAKE(V v_plain(V v), return v;)
MAKE(V v_four(const int8_t *q), uint32_t x; memcpy(&x, q, 4);
     return vreinterpretq_u8_u32(vdupq_n_u32(x));)
MAKE(V v_sixteen(const void *q), return vld1q_u8(q);)
MAKE(V v_and(V a, V b), return vandq_u8(a, b);)
MAKE(V v_or(V a, V b), return vorrq_u8(a, b);)
MAKE(V v_not_and(V a, V b), return vbicq_u8(b, a);)
MAKE(V v_equal(V a, V b), return vceqq_u8(a, b);)
MAKE(V v_pick(V x, V at), return vqtbl1q_u8(x, at);)
MAKE(V v_words(uint32_t a, uint32_t b, uint32_t c, uint32_t d),
     uint32_t w[4] = {a, b, c, d}; return vreinterpretq_u8_u32(vld1q_u32(w));)
MAKE(V v_count(void), return vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));)
MAKE(V v_spread(int j),
     return vaddq_u8(v_set(j), v_words(0, 0x04040404, 0x08080808, 0x0c0c0c0c));)
MAKE(V v_place(V v, int field),
     return vandq_u8(vshlq_u8(v, vdupq_n_s8((int8_t)(-2 * field))), v_set(3));)
MAKE(V v_index(V v, int field),
     return v_or(v_place(v, field), vreinterpretq_u8_u32(vdupq_n_u32(field & 1 ? 0x0c0c0808
                                                                               : 0x04040000)));)
MAKE(V v_zero(const uint8_t *p), return v_words(p[0] * 0x01010101u, p[1] * 0x01010101u,
                                                p[2] * 0x01010101u, p[3] * 0x01010101u);)
MAKE(I i_set(int x), return vdupq_n_s32(x);)
MAKE(I i_bytes(const uint8_t *p), int32_t w[4] = {p[0], p[1], p[2], p[3]};
     return vld1q_s32(w);)
MAKE(I i_add(I a, I b), return vaddq_s32(a, b);)
MAKE(I i_sub(I a, I b), return vsubq_s32(a, b);)
MAKE(I i_mul(I a, I b), return vmulq_s32(a, b);)
MAKE(I i_high(I a), return a;)
MAKE(I i_dot8(I c, V u, V q), return vdotq_s32(c, S(veorq_u8(u, v_set(128))), S(q));)
MAKE(A a_zero(void), return i_set(0);)
MAKE(A a_dot(A a, V u, V q), return vdotq_s32(a, S(u), S(q));)
MAKE(I a_total(I total, A a), return vaddq_s32(total, a);)
MAKE(F f_set(float x), return vdupq_n_f32(x);)
MAKE(F f_zero(void), return f_set(0);)
MAKE(F f_half(const uint8_t *p), float16x4_t h; memcpy(&h, p, 8); return vcvt_f32_f16(h);)
MAKE(F f_of(I i), return vcvtq_f32_s32(i);)
MAKE(F f_mul(F a, F b), return vmulq_f32(a, b);)
MAKE(F f_fma(F a, F b, F c), return vfmaq_f32(c, a, b);)
MAKE(void f_store(float *p, F f), vst1q_f32(p, f);)

static inline void scatter(const uint8_t *mask, const uint8_t **kept, int shift, int low,
                           uint8_t *out) {
  for (int k = 0; k < 16; k++)
    if (mask[k / 8] >> k % 8 & 1) out[k] = (uint8_t)(*(*kept)++ >> shift & low);
}

/* Correct, but not fast: expanding a mask costs more here than it saves. */
static inline void expand4(const uint8_t *mask, const uint8_t **kept, int narrow, V z0, V z1,
                           V *o0, V *o1) {
  uint8_t out[32];
  (void)narrow;
  v_store(out, z0), v_store(out + 16, z1);
  scatter(mask, &kept[0], 0, 15, out);
  scatter(mask + 2, &kept[1], 4, 15, out + 16);
  *o0 = v_load(out), *o1 = v_load(out + 16);
}

static inline void expand8(const uint8_t *mask, const uint8_t **kept, V z0, V z1, V *o0, V *o1) {
  uint8_t out[32];
  v_store(out, z0), v_store(out + 16, z1);
  scatter(mask, &kept[0], 0, 255, out);
  scatter(mask + 2, &kept[0], 0, 255, out + 16);
  *o0 = v_load(out), *o1 = v_load(out + 16);
}

#include "products.h"

#include "end_target.h"

#ifdef __APPLE__ /* all of Apple's processors for macOS have the instructions */
static int here(void) { return 1; }
#else
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
static int here(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif
const SqftKernels sqft_neon = {"neon", LANES, here, rounded, one, many, scratch_bytes};
#endif

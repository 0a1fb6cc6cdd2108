/* AVX2 with F16C and FMA; with -DVNNI (avx2_vnni.c) also AVX-VNNI. */
#if defined(__x86_64__)
#if defined(VNNI) && !defined(SQFT_EMULATED) /* tests run this file on any machine */
#define TARGET "avx2,popcnt,f16c,fma,avxvnni"
#else
#define TARGET "avx2,popcnt,f16c,fma"
#endif
#include "begin_target.h"
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define NARROW_READS 0
#define TOKENS 4
#define MAKE(T, ...) static inline T { __VA_ARGS__ }

typedef __m256i V;
typedef __m256i I;
typedef __m256 F;

MAKE(V v_load(const void *p), return _mm256_loadu_si256(p);)
MAKE(void v_store(void *p, V v), _mm256_storeu_si256(p, v);)
MAKE(V v_set(int x), return _mm256_set1_epi8((char)x);)
MAKE(V v_one(void), return v_set(1);)
MAKE(V v_low(V v), return _mm256_and_si256(v, v_set(15));)
MAKE(V v_four(const int8_t *q), int x; memcpy(&x, q, 4); return _mm256_set1_epi32(x);)
MAKE(V v_sixteen(const void *q), return _mm256_broadcastsi128_si256(_mm_loadu_si128(q));)
MAKE(V v_and(V a, V b), return _mm256_and_si256(a, b);)
MAKE(V v_or(V a, V b), return _mm256_or_si256(a, b);)
MAKE(V v_not_and(V a, V b), return _mm256_andnot_si256(a, b);)
MAKE(V v_equal(V a, V b), return _mm256_cmpeq_epi8(a, b);)
MAKE(V v_pick(V x, V at), return _mm256_shuffle_epi8(x, at);)
MAKE(V v_count(void), return _mm256_set1_epi32(0x03020100);)
MAKE(V v_spread(int j), return _mm256_add_epi8(
         v_set(j), _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404,
                                     0x08080808, 0x0c0c0c0c));)
MAKE(V v_place(V v, int field), return v_and(_mm256_srli_epi16(v, 2 * field), v_set(3));)
MAKE(V v_index(V v, int field),
     return v_or(v_place(v, field), _mm256_set1_epi32(field & 1 ? 0x0c0c0808 : 0x04040000));)
MAKE(V v_zero(const uint8_t *p), int64_t x; memcpy(&x, p, 8); return _mm256_shuffle_epi8(
         _mm256_set1_epi64x(x), _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404,
                                                  0x05050505, 0x06060606, 0x07070707));)
MAKE(I i_set(int x), return _mm256_set1_epi32(x);)
MAKE(I i_bytes(const uint8_t *p), return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));)
MAKE(I i_add(I a, I b), return _mm256_add_epi32(a, b);)
MAKE(I i_sub(I a, I b), return _mm256_sub_epi32(a, b);)
MAKE(I i_mul(I a, I b), return _mm256_mullo_epi32(a, b);)
MAKE(F f_set(float x), return _mm256_set1_ps(x);)
MAKE(F f_zero(void), return _mm256_setzero_ps();)
MAKE(F f_half(const uint8_t *p), return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));)
MAKE(F f_of(I i), return _mm256_cvtepi32_ps(i);)
MAKE(F f_mul(F a, F b), return _mm256_mul_ps(a, b);)
MAKE(F f_fma(F a, F b, F c), return _mm256_fmadd_ps(a, b, c);)
MAKE(void f_store(float *p, F f), _mm256_storeu_ps(p, f);)

#ifdef VNNI
#define HIGH 16
#define SIGNED8 0
#define FLUSH 64
typedef I A;
MAKE(V v_high(V v), return v_and(v, v_set(-16));)
MAKE(V v_plain(V v), return v_and(_mm256_srli_epi16(v, 4), v_set(15));)
MAKE(I i_high(I a), return _mm256_slli_epi32(a, 4);)
MAKE(I i_dot8(I c, V u, V q), return _mm256_dpbusd_avx_epi32(c, u, q);)
MAKE(A a_zero(void), return _mm256_setzero_si256();)
MAKE(A a_dot(A a, V u, V q), return _mm256_dpbusd_avx_epi32(a, u, q);)
MAKE(I a_total(I total, A a), return _mm256_add_epi32(total, a);)
#else
#define HIGH 1
#define SIGNED8 1
#define FLUSH 8 /* 8 * 2 * 15 * 127 < 2^15 */
typedef __m256i A;
MAKE(V v_high(V v), return v_and(_mm256_srli_epi16(v, 4), v_set(15));)
MAKE(V v_plain(V v), return v;)
MAKE(I i_high(I a), return a;)
/* The instruction adds pairs of products and saturates at 2^15. With signed codes, whose signs are
   moved to q, it can't saturate. */
static inline I i_dot8(I c, V u, V q) {
  V s = _mm256_xor_si256(u, v_set(-128));
  V p = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(q, s));
  return _mm256_add_epi32(c, _mm256_madd_epi16(p, _mm256_set1_epi16(1)));
}
MAKE(A a_zero(void), return _mm256_setzero_si256();)
MAKE(A a_dot(A a, V u, V q), return _mm256_add_epi16(a, _mm256_maddubs_epi16(u, q));)
MAKE(I a_total(I total, A a),
     return _mm256_add_epi32(total, _mm256_madd_epi16(a, _mm256_set1_epi16(1)));)
#endif

/* The source index of each of 8 bytes: the next code if its bit is set, else none (128). */
#define BELOW(m, j) __builtin_popcount((m) & ((1 << (j)) - 1))
#define B(m, j) ((m) >> (j) & 1 ? (uint64_t)BELOW(m, j) << 8 * (j) : 128ull << 8 * (j))
#define B8(m) (B(m, 0) | B(m, 1) | B(m, 2) | B(m, 3) | B(m, 4) | B(m, 5) | B(m, 6) | B(m, 7))
#define R4(m) B8(m), B8((m) + 1), B8((m) + 2), B8((m) + 3)
#define R16(m) R4(m), R4((m) + 4), R4((m) + 8), R4((m) + 12)
#define R64(m) R16(m), R16((m) + 16), R16((m) + 32), R16((m) + 48)
static const uint64_t sources[256] = {R64(0), R64(64), R64(128), R64(192)};

/* `pdep` would be shorter, but takes 20 cycles on many processors. */
typedef double __attribute__((aligned(1), may_alias)) Eight;
static inline __m128i two(const void *low, const void *high) {
  return _mm_castpd_si128(_mm_set_pd(*(const Eight *)high, *(const Eight *)low));
}

/* Expand kept codes to bytes. Bytes without a code have the high bit set in `from`. */
static inline V expand(const uint8_t *mask, const uint8_t **kept, V *from) {
  const uint8_t *p0 = *kept, *p1 = p0 + _mm_popcnt_u32(mask[0]), *p2 = p1 + _mm_popcnt_u32(mask[1]),
                *p3 = p2 + _mm_popcnt_u32(mask[2]);
  *kept = p3 + _mm_popcnt_u32(mask[3]);
  V codes = _mm256_set_m128i(two(p2, p3), two(p0, p1));
  *from = _mm256_set_m128i(two(sources + mask[2], sources + mask[3]),
                           two(sources + mask[0], sources + mask[1]));
  *from = _mm256_add_epi8(*from, _mm256_setr_epi64x(0, 0x0808080808080808, 0, 0x0808080808080808));
  return v_pick(codes, *from);
}

static inline void expand4(const uint8_t *mask, const uint8_t **kept, int narrow, V z0, V z1,
                           V *o0, V *o1) {
  V from0, from1, low = expand(mask, &kept[0], &from0), high = expand(mask + 4, &kept[1], &from1);
  (void)narrow;
  if (HIGH != 1) z1 = _mm256_slli_epi16(z1, 4); /* values are below 16, so no bit leaves its byte */
  *o0 = _mm256_blendv_epi8(v_low(low), z0, from0);
  *o1 = _mm256_blendv_epi8(v_high(high), z1, from1);
}

static inline void expand8(const uint8_t *mask, const uint8_t **kept, V z0, V z1, V *o0, V *o1) {
  V from;
  *o0 = expand(mask, &kept[0], &from);
  *o0 = _mm256_blendv_epi8(*o0, z0, from);
  *o1 = expand(mask + 4, &kept[0], &from);
  *o1 = _mm256_blendv_epi8(*o1, z1, from);
}

#include "products.h"

#include "end_target.h"

static int here(void) {
  __builtin_cpu_init();
#if defined(VNNI) && !defined(SQFT_EMULATED)
  /* AVX-VNNI, for which GCC 12 has no name: leaf 7, sub-leaf 1, EAX bit 4 */
  uint32_t a = 7, b, c = 1, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (!(a >> 4 & 1)) return 0;
#endif
  /* clang can't query F16C, but every processor with AVX2 has it */
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("fma");
}

#ifdef VNNI
const SqftKernels sqft_avx2_vnni = {"avx2-vnni", LANES, here, rounded, one, many, scratch_bytes};
#else
const SqftKernels sqft_avx2 = {"avx2", LANES, here, rounded, one, many, scratch_bytes};
#endif
#endif

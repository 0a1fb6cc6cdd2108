/* AVX-512 with VNNI and VBMI2, which has an instruction that expands kept codes. With -DAMX (amx.c)
   also AMX. */
#if defined(__x86_64__)
#ifndef SQFT_EMULATED /* tests run this file on any machine */
#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,popcnt,fma,f16c"
#ifdef AMX
#define TARGET AVX512 ",amx-tile,amx-int8"
#else
#define TARGET AVX512
#endif
#include "begin_target.h"
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

#define LANES 16
#define HIGH 16
#define SIGNED8 0
#define FLUSH 64
#define NARROW_READS 1
#ifdef AMX
#define TOKENS 1
#else
#define TOKENS 8
#endif
#define MAKE(T, ...) static inline T { __VA_ARGS__ }

typedef __m512i V;
typedef __m512i I;
typedef __m512i A;
typedef __m512 F;

MAKE(V v_load(const void *p), return _mm512_loadu_si512(p);)
MAKE(void v_store(void *p, V v), _mm512_storeu_si512(p, v);)
MAKE(V v_set(int x), return _mm512_set1_epi8((char)x);)
MAKE(V v_one(void), return v_set(1);)
MAKE(V v_and(V a, V b), return _mm512_and_si512(a, b);)
MAKE(V v_or(V a, V b), return _mm512_or_si512(a, b);)
MAKE(V v_not_and(V a, V b), return _mm512_andnot_si512(a, b);)
MAKE(V v_equal(V a, V b), return _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(a, b));)
MAKE(V v_low(V v), return v_and(v, v_set(15));)
MAKE(V v_high(V v), return v_and(v, v_set(-16));)
MAKE(V v_plain(V v), return v_and(_mm512_srli_epi16(v, 4), v_set(15));)
MAKE(V v_four(const int8_t *q), int x; memcpy(&x, q, 4); return _mm512_set1_epi32(x);)
MAKE(V v_sixteen(const void *q), return _mm512_broadcast_i32x4(_mm_loadu_si128(q));)
MAKE(V v_pick(V x, V at), return _mm512_shuffle_epi8(x, at);)
MAKE(V v_count(void), return _mm512_set1_epi32(0x03020100);)
MAKE(V v_spread(int j), return _mm512_add_epi8(
         v_set(j), _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));)
MAKE(V v_place(V v, int field), return v_and(_mm512_srli_epi16(v, 2 * (unsigned)field), v_set(3));)
MAKE(V v_index(V v, int field),
     return v_or(v_place(v, field), _mm512_set1_epi32(field & 1 ? 0x0c0c0808 : 0x04040000));)
MAKE(I i_set(int x), return _mm512_set1_epi32(x);)
MAKE(I i_bytes(const uint8_t *p), return _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));)
/* repeat the byte of each lane 4 times */
MAKE(V v_zero(const uint8_t *p),
     return _mm512_shuffle_epi8(i_bytes(p), _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));)
MAKE(I i_add(I a, I b), return _mm512_add_epi32(a, b);)
MAKE(I i_sub(I a, I b), return _mm512_sub_epi32(a, b);)
MAKE(I i_mul(I a, I b), return _mm512_mullo_epi32(a, b);)
MAKE(I i_high(I a), return _mm512_slli_epi32(a, 4);)
MAKE(I i_dot8(I c, V u, V q), return _mm512_dpbusd_epi32(c, u, q);)
MAKE(A a_zero(void), return _mm512_set1_epi32(0);)
MAKE(A a_dot(A a, V u, V q), return _mm512_dpbusd_epi32(a, u, q);)
MAKE(I a_total(I total, A a), return _mm512_add_epi32(total, a);)
MAKE(F f_set(float x), return _mm512_set1_ps(x);)
MAKE(F f_zero(void), return _mm512_set1_ps(0);)
MAKE(F f_half(const uint8_t *p), return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));)
MAKE(F f_of(I i), return _mm512_cvtepi32_ps(i);)
MAKE(F f_mul(F a, F b), return _mm512_mul_ps(a, b);)
MAKE(F f_fma(F a, F b, F c), return _mm512_fmadd_ps(a, b, c);)
MAKE(void f_store(float *p, F f), _mm512_storeu_ps(p, f);)

/* Expand into the zeros. `maskz` would depend on the former content of its register. */
static inline V expand(V zero, const uint8_t *mask, V codes) {
  uint64_t bits;
  memcpy(&bits, mask, 8);
  return _mm512_mask_expand_epi8(zero, bits, codes);
}

static inline size_t count(const uint8_t *mask) {
  uint64_t bits;
  memcpy(&bits, mask, 8);
  return (size_t)__builtin_popcountll(bits);
}

/* Load only 32 bytes if they hold all codes: fewer loads cross a cache line. */
static inline V codes_at(const uint8_t *p, int narrow) {
  return narrow ? _mm512_castsi256_si512(_mm256_loadu_si256((const void *)p)) : v_load(p);
}

static inline void expand4(const uint8_t *mask, const uint8_t **kept, int narrow, V z0, V z1,
                           V *o0, V *o1) {
  *o0 = expand(z0, mask, v_low(codes_at(kept[0], narrow)));
  *o1 = expand(_mm512_slli_epi16(z1, 4), mask + 8, v_high(codes_at(kept[1], narrow)));
  kept[0] += count(mask);
  kept[1] += count(mask + 8);
}

static inline void expand8(const uint8_t *mask, const uint8_t **kept, V z0, V z1, V *o0, V *o1) {
  *o0 = expand(z0, mask, v_load(kept[0]));
  kept[0] += count(mask);
  *o1 = expand(z1, mask + 8, v_load(kept[0]));
  kept[0] += count(mask + 8);
}

#ifdef AMX
#define MATRIX_REGISTERS
#endif
#include "products.h"

#ifdef SQFT_EMULATED
static int here(void) { return 1; }
#else
#include "end_target.h"

#ifdef AMX
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* The system saves a process's matrix registers only after this request. */
static int amx_here(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return 0; /* tile, int8 */
#if defined(__linux__)
  enum { ASK = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM */
  return !syscall(SYS_arch_prctl, ASK, TILE_DATA);
#else
  return 0;
#endif
}
#else
static int amx_here(void) { return 1; }
#endif

static int here(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") && amx_here();
}
#endif

#ifdef AMX
const SqftKernels sqft_amx = {"avx512-amx", LANES, here, rounded, one, many, scratch_bytes};
#else
const SqftKernels sqft_avx512 = {"avx512", LANES, here, rounded, one, many, scratch_bytes};
#endif
#endif

/* The instruction of AVX-VNNI that sqft_export/kernels/avx2.c uses, of AVX2's. */
#pragma once
#include <immintrin.h>

__attribute__((target("avx2"))) static inline __m256i emulated_dpbusd(__m256i c, __m256i u,
                                                                      __m256i s) {
  const __m256i mask = _mm256_set1_epi16(255);
  /* even and odd bytes as 16 bits, whose products do not saturate */
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, mask),
                                   _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
}
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd

/* Inflate sparse weights: mask bits and kept codes back to dense codes.

   sqft_inflate(bits, mask, first, count, kept, kept_bytes, fill, group, out, level)

   Writes elements first .. first+count of a tensor to `out`; out[0] holds element `first`. Elements
   have `bits` bits. `first` is a multiple of 16. So is count, unless the tensor ends there.
   Bit e of `mask` (lowest first) is set if element e is kept. `kept` holds the kept codes without
   gaps, lowest bits first. An element that is not kept gets the fill of its group: fill[e / group]
   for group > 0, else fill[0]. Returns the number of kept elements, or -1 if `kept` is too short.
   Nothing is read or written outside the given sizes.

   There are three implementations: 64 elements at a time by byte expansion (AVX-512 VBMI2, level
   2), one word at a time by bit deposit (BMI2, level 1), and one element at a time (level 0).
   `level` selects one; sqft_level() returns the highest that this processor supports. */

#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_DEPOSIT 1
#include <immintrin.h>
#endif

static int64_t inflate_plain(int bits, const uint8_t *mask, int64_t first, int64_t count,
                             const uint8_t *kept, int64_t kept_bytes, const uint32_t *fill,
                             int64_t group, uint8_t *out, int64_t taken) {
    int64_t limit = kept_bytes * 8 / bits;
    for (int64_t i = 0; i < count; i++) {
        int64_t e = first + i;
        uint32_t value = fill[group > 0 ? e / group : 0];
        if (mask[e >> 3] >> (e & 7) & 1) {
            if (taken >= limit) return -1;
            if (bits == 4) value = kept[taken >> 1] >> (taken & 1) * 4 & 15;
            else { value = 0; memcpy(&value, kept + taken * (bits / 8), bits / 8); }
            taken++;
        }
        if (bits == 4) {
            if (i & 1) out[i >> 1] |= (uint8_t)(value << 4);
            else out[i >> 1] = (uint8_t)value;
        } else memcpy(out + i * (bits / 8), &value, bits / 8);
    }
    return taken;
}

#ifdef HAVE_DEPOSIT
/* Inflate 64-bit words: 16, 8, 4 or 2 elements of 4, 8, 16 or 32 bits. `bits` is a constant in
   every caller. No branch depends on the mask: it would be mispredicted half of the time. */
__attribute__((target("bmi2,popcnt"), always_inline))
static inline int64_t inflate_words(const int bits, const uint8_t *mask, int64_t first,
                                    int64_t count, const uint8_t *kept, int64_t kept_bytes,
                                    const uint32_t *fill, int64_t group, uint8_t *out,
                                    int64_t done, int64_t taken) {
    const int each = 64 / bits;
    const uint64_t ones = bits == 32 ? 0xffffffffu : (1ull << bits) - 1;
    const uint64_t spread = ~0ull / ones; /* the lowest bit of every element */
    /* A word of kept codes is read as nine bytes. The plain loop handles the last elements. */
    const int64_t safe = (kept_bytes - 9) * 8 / bits - each;
    const int64_t whole = count - count % each;
    while (done < whole && taken <= safe) {
        uint64_t filled = spread * fill[group > 0 ? (first + done) / group : 0];
        int64_t until = whole;
        if (group > 0) {
            if (group % each) break;
            until = ((first + done) / group + 1) * group - first;
            if (until > whole) until = whole;
        }
        for (; done < until && taken <= safe; done += each) {
            int64_t e = first + done;
            uint64_t chosen;
            if (bits == 4) {
                uint16_t both;
                memcpy(&both, mask + (e >> 3), 2);
                chosen = both;
            } else chosen = mask[e >> 3] >> (e & 7) & ((1u << each) - 1);
            uint64_t lanes = _pdep_u64(chosen, spread) * ones;
            const uint8_t *at = kept + (taken * bits >> 3);
            uint64_t codes;
            memcpy(&codes, at, 8);
            if (bits == 4) { /* if `taken` is odd, the codes start in the middle of a byte */
                int odd = (int)(taken & 1) * 4;
                codes = codes >> odd | (uint64_t)at[8] << 1 << (63 - odd);
            }
            uint64_t word = _pdep_u64(codes, lanes) | (filled & ~lanes);
            memcpy(out + (done * bits >> 3), &word, 8);
            taken += __builtin_popcountll(chosen);
        }
    }
    return inflate_plain(bits, mask, first + done, count - done, kept, kept_bytes, fill, group,
                         out + (done * bits >> 3), taken);
}

__attribute__((target("bmi2,popcnt")))
static int64_t inflate_by_words(int bits, const uint8_t *mask, int64_t first, int64_t count,
                                const uint8_t *kept, int64_t kept_bytes, const uint32_t *fill,
                                int64_t group, uint8_t *out, int64_t done, int64_t taken) {
#define WORDS(bits) \
    inflate_words(bits, mask, first, count, kept, kept_bytes, fill, group, out, done, taken)
    switch (bits) {
    case 4: return WORDS(4);
    case 8: return WORDS(8);
    case 16: return WORDS(16);
    default: return WORDS(32);
    }
#undef WORDS
}

/* Inflate 64 elements of 4 or 8 bits at a time. done_out and taken_out report the progress;
   inflate_by_words does the rest. */
__attribute__((target("avx512f,avx512bw,avx512vbmi2,bmi2,popcnt")))
static void inflate_vectors(int bits, const uint8_t *mask, int64_t first, int64_t count,
                            const uint8_t *kept, int64_t kept_bytes, const uint32_t *fill,
                            int64_t group, uint8_t *out, int64_t *done_out, int64_t *taken_out) {
    int64_t taken = 0, done = 0;
    /* A vector of codes is read as 33 or 64 bytes, even if the mask keeps fewer. */
    const int64_t safe = bits == 4 ? kept_bytes * 2 - 68 : kept_bytes - 64;
    const __m512i nibble = _mm512_set1_epi16(15);
    while (done + 64 <= count && taken <= safe) {
        const __m512i filled =
            _mm512_set1_epi8((char)fill[group > 0 ? (first + done) / group : 0]);
        int64_t until = count - 63;
        if (group > 0 && ((first + done) / group + 1) * group - first < until)
            until = ((first + done) / group + 1) * group - first;
        for (; done < until && taken <= safe; done += 64) {
            uint64_t chosen;
            memcpy(&chosen, mask + ((first + done) >> 3), 8);
            if (bits == 8) {
                __m512i codes = _mm512_loadu_si512(kept + taken);
                codes = _mm512_mask_expand_epi8(filled, chosen, codes);
                _mm512_storeu_si512(out + done, codes);
            } else { /* widen nibbles to bytes, expand, and narrow again */
                const int odd = (int)(taken & 1);
                const uint8_t *at = kept + (taken >> 1);
                __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)at));
                __m512i high =
                    _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(at + odd)));
                low = _mm512_and_si512(_mm512_srl_epi16(low, _mm_cvtsi32_si128(4 * odd)), nibble);
                high = _mm512_srl_epi16(high, _mm_cvtsi32_si128(4 - 4 * odd));
                high = _mm512_slli_epi16(_mm512_and_si512(high, nibble), 8);
                __m512i wide =
                    _mm512_mask_expand_epi8(filled, chosen, _mm512_or_si512(low, high));
                wide = _mm512_or_si512(wide, _mm512_srli_epi16(wide, 4));
                _mm256_storeu_si256((__m256i *)(out + (done >> 1)), _mm512_cvtepi16_epi8(wide));
            }
            taken += __builtin_popcountll(chosen);
        }
    }
    *done_out = done;
    *taken_out = taken;
}
#endif

EXPORT int sqft_level(void) {
#ifdef HAVE_DEPOSIT
    if (!__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("popcnt")) return 0;
    return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") ? 2 : 1;
#else
    return 0;
#endif
}

EXPORT int64_t sqft_inflate(int bits, const uint8_t *mask, int64_t first, int64_t count,
                            const uint8_t *kept, int64_t kept_bytes, const uint32_t *fill,
                            int64_t group, uint8_t *out, int level) {
#ifdef HAVE_DEPOSIT
    int64_t done = 0, taken = 0;
    if (level > 1 && bits <= 8 && group % 64 == 0)
        inflate_vectors(bits, mask, first, count, kept, kept_bytes, fill, group, out, &done, &taken);
    if (level > 0 && count > 0)
        return inflate_by_words(bits, mask, first, count, kept, kept_bytes, fill, group, out, done,
                                taken);
#endif
    (void)level;
    return inflate_plain(bits, mask, first, count, kept, kept_bytes, fill, group, out, 0);
}

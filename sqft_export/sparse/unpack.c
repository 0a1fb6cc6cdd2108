/* Inflate sparse weights: mask bits and kept codes back to dense codes.

   sqft_inflate(bits, mask, first, count, kept, kept_bytes, fill, group, row_groups, row_stride, out)

   Writes elements first .. first+count of a tensor of `bits`-wide elements to `out`, which is where
   element `first` lies. `first` is a multiple of 16 and, unless the tensor ends there, so is count.
   Bit e of `mask` (lowest first) says whether element e is kept; kept codes follow each other in
   `kept`, lowest first, from its first bit on. An element that is not kept gets the fill of its
   group: fill[e / group] for group > 0, else fill[0]. Returns the number of kept elements, or -1 if
   `kept` is too short; nothing is ever read or written outside the given sizes.

   Two ways: one word at a time by the processor's bit deposit (BMI2), and one element at a time. */

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
/* Elements of one 64-bit word: 16, 8, 4 or 2 of 4, 8, 16 or 32 bits. */
__attribute__((target("bmi2,popcnt")))
static int64_t inflate_words(int bits, const uint8_t *mask, int64_t first, int64_t count,
                             const uint8_t *kept, int64_t kept_bytes, const uint32_t *fill,
                             int64_t group, uint8_t *out) {
    const int each = 64 / bits;
    const uint64_t ones = bits == 32 ? 0xffffffffu : (1ull << bits) - 1;
    const uint64_t spread = ~0ull / ones; /* a one at the bottom of every element */
    int64_t taken = 0, done = 0, until = 0;
    uint64_t filled = spread * fill[0];
    /* A word of kept codes is read as nine bytes; the last ones are left to the plain loop. */
    int64_t safe = (kept_bytes - 9) * 8 / bits - each;
    while (done + each <= count && taken <= safe) {
        int64_t e = first + done;
        if (group > 0 && e >= until) {
            if (group % each) break;
            filled = spread * fill[e / group];
            until = (e / group + 1) * group;
        }
        uint64_t chosen = mask[e >> 3];
        if (each == 16) chosen |= (uint64_t)mask[(e >> 3) + 1] << 8;
        else if (each < 8) chosen = chosen >> (e & 7) & ((1u << each) - 1);
        uint64_t lanes = _pdep_u64(chosen, spread) * ones;
        uint64_t codes;
        int64_t at = taken * bits;
        memcpy(&codes, kept + (at >> 3), 8);
        if (at & 7) codes = codes >> 4 | (uint64_t)kept[(at >> 3) + 8] << 60;
        uint64_t word = _pdep_u64(codes, lanes) | (filled & ~lanes);
        memcpy(out + done * bits / 8, &word, 8);
        taken += __builtin_popcountll(chosen);
        done += each;
    }
    return inflate_plain(bits, mask, first + done, count - done, kept, kept_bytes, fill, group,
                         out + done * bits / 8, taken);
}
#endif

EXPORT int sqft_has_words(void) {
#ifdef HAVE_DEPOSIT
    return __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#else
    return 0;
#endif
}

EXPORT int64_t sqft_inflate(int bits, const uint8_t *mask, int64_t first, int64_t count,
                            const uint8_t *kept, int64_t kept_bytes, const uint32_t *fill,
                            int64_t group, uint8_t *out, int words) {
#ifdef HAVE_DEPOSIT
    if (words && count > 0)
        return inflate_words(bits, mask, first, count, kept, kept_bytes, fill, group, out);
#endif
    (void)words;
    return inflate_plain(bits, mask, first, count, kept, kept_bytes, fill, group, out, 0);
}

/* The packed format of a compressed matrix, which the kernels read. This is its only description.

   A matrix of `rows` x `inputs` is cut into tiles of 2 * lanes rows. `lanes` is the number of rows
   per vector of the instruction set: 16 (AVX-512), 8 (AVX2, plain C), 4 (NEON). A vector holds 4
   consecutive inputs of each of its rows, one byte each: byte 4 * lane + j is input j of a lane.
   The first `lanes` rows of a tile are its vector 0, the others its vector 1.

   Inputs are cut into groups of `group`. Per row, each group has one scale (float16) and, if
   `asymmetric`, one zero point (uint8): w = scale * (code - zero). Symmetric codes have the zero
   point 2^(bits - 1). A group is padded with its zero point to `span` inputs, a multiple of 16 (of
   32 for pairs).

   fixed   for every tile and group: scale [2 * lanes], zero [2 * lanes] if asymmetric, then
     dense, for every 4 inputs       INT4: one vector, vector 0 in the low nibbles, 1 in the high;
                                     INT8: vector 0, vector 1
     mask, for every 4 inputs        one bit per byte of vector 0 (lowest first), then of vector 1;
                                     set if the code is kept
     pairs, for every 32 inputs,     one vector of indices, then codes. At most 2 of 4 adjacent
       for vector 0 and 1            inputs are kept, so 8 inputs of a row have 4 kept codes: one
                                     vector. An index of 2 bits is a code's position in its four
                                     inputs. Indices of inputs 0..7 are bits 0, 1 of their byte, of
                                     8..15 bits 2, 3, and so on. INT4: inputs 0..7 in low nibbles,
                                     8..15 in high ones, then 16..31 in the same way; INT8: four
                                     vectors
   kept    mask only, for every tile: the kept codes. INT4: codes of vector 0 in low nibbles, of
           vector 1 in high ones, each from the tile's start on. INT8: codes of the two vectors
           alternate every 4 inputs. `offsets` holds the start of each tile and the end of the last
   narrow  mask only, for every tile and group: 1 if no vector of the group keeps more than half of
           its bytes; then reading half a vector suffices */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define SQFT_MAGIC "SQFTMATR"
#define SQFT_VERSION 1
#define SQFT_LONGEST_GROUP 4096 /* inputs; the sum of 8-bit products stays far below 2^31 */
#define SQFT_SLACK 128 /* bytes after the end that a vector load may read */

enum { SQFT_DENSE, SQFT_MASK, SQFT_PAIRS };

typedef struct {
  char magic[8];
  uint32_t version, format, bits, lanes, asymmetric;
  uint32_t rows, inputs;
  uint32_t stored_group; /* inputs that share a scale in the model */
  uint32_t group;        /* stored_group or a divisor of it; activations are rounded by it */
  uint32_t span, groups, tiles;
  uint32_t resident; /* only set in memory: read in place, in huge pages */
  uint64_t group_bytes; /* of the fixed part, including scale and zero */
  uint64_t offsets, narrow, fixed, kept, bytes; /* from the start of this header */
} SqftMatrix;

/* Activations of the tokens of one call, rounded per group: codes interleaved as the kernels read
   them, sqft_code_bytes long; scale and sum of the codes, both [groups, tokens]. */
typedef struct {
  int8_t *codes;
  float *scale;
  int32_t *sum;
} SqftInputs;

#define SQFT_TOGETHER 8 /* largest number of interleaved tokens */
static inline size_t sqft_code_bytes(const SqftMatrix *m, size_t tokens) {
  return (tokens + SQFT_TOGETHER - 1) * m->groups * m->span;
}
static inline size_t sqft_tile_rows(const SqftMatrix *m) { return 2 * (size_t)m->lanes; }
static inline size_t sqft_head_bytes(const SqftMatrix *m) {
  return sqft_tile_rows(m) * (m->asymmetric ? 3 : 2);
}
static inline size_t sqft_tile_bytes(const SqftMatrix *m) { return m->groups * m->group_bytes; }
static inline const uint8_t *sqft_fixed(const SqftMatrix *m, size_t tile) {
  return (const uint8_t *)m + m->fixed + tile * sqft_tile_bytes(m);
}
static inline const uint8_t *sqft_kept(const SqftMatrix *m, size_t tile) {
  uint64_t at = ((const uint64_t *)((const uint8_t *)m + m->offsets))[tile];
  return (const uint8_t *)m + m->kept + at;
}

/* The functions of one instruction set. here: whether this processor supports it. round: round
   token t of `tokens` to int8. one: products with one token. many: products with several tokens,
   which need scratch_bytes of scratch memory. Products are computed for tiles first..last. */
typedef struct {
  const char *name;
  uint32_t lanes;
  int (*here)(void);
  void (*round)(const SqftMatrix *, const float *x, size_t t, size_t tokens, SqftInputs *);
  void (*one)(const SqftMatrix *, const SqftInputs *, float *y, size_t first, size_t last);
  void (*many)(const SqftMatrix *, const SqftInputs *, size_t tokens, float *y, size_t first,
               size_t last, uint8_t *scratch);
  size_t (*scratch_bytes)(const SqftMatrix *, size_t tokens);
} SqftKernels;

extern const SqftKernels sqft_plain;
#if defined(__x86_64__)
extern const SqftKernels sqft_avx2, sqft_avx2_vnni, sqft_avx512, sqft_amx;
#elif defined(__aarch64__)
extern const SqftKernels sqft_neon;
#endif

/* The fastest kernels that this processor supports, or those with a name; NULL if none. */
const SqftKernels *sqft_kernels(const char *name);

/* Compute all header fields from format, bits, lanes, asymmetric, rows, inputs and stored_group.
   kept: kept codes per row, for the mask format. Returns 0, or -1 if the shape is not supported. */
int sqft_plan(SqftMatrix *m, const uint32_t *kept);
/* Count the kept codes of every row: those that differ from their zero point. Returns 1 if no 4
   adjacent inputs have more than 2 of them. codes: row major, for INT4 two per byte (low first);
   each code is XORed with `flip`. */
int sqft_count(const uint8_t *codes, uint32_t bits, uint32_t flip, const uint8_t *zero,
               uint32_t rows, uint32_t inputs, uint32_t group, uint32_t *kept);
/* Write the offsets of the kept codes of every tile. Call it before sqft_pack. */
void sqft_place(SqftMatrix *m, const uint32_t *kept);
/* Pack tiles `first` to `last` of a planned matrix. zero: NULL if symmetric. */
void sqft_pack(SqftMatrix *m, const uint8_t *codes, uint32_t flip, const uint8_t *zero,
               const uint16_t *scale, size_t first, size_t last);
/* Write which groups are narrow. Call it after all tiles are packed. */
void sqft_seal(SqftMatrix *m);
/* Unpack: one code per byte [rows, inputs], zero and scale [rows, inputs / stored_group]. */
void sqft_unpack(const SqftMatrix *m, uint8_t *codes, uint8_t *zero, uint16_t *scale);
/* Dequantize one row to float32 [inputs], for embedding lookups. */
void sqft_row(const SqftMatrix *m, size_t row, float *out);
/* Returns 0 if the header is consistent and all its parts are within `size` bytes, else -1. */
int sqft_check(const SqftMatrix *m, size_t size);

/* Multiply without rounding: float32 activations [tokens, inputs], y [tokens, rows]. */
void sqft_exact(const SqftMatrix *m, const float *x, size_t tokens, float *y, size_t first,
                size_t last);
/* Multiply all rows on one thread. mode 0: 1 for a single token, else 2; 1: token by token; 2: all
   tokens at once; 3: without rounding. Returns 0, or -1 if kernels or memory are missing. */
int sqft_multiply(const char *name, const SqftMatrix *m, const float *x, size_t tokens, float *y,
                  int mode);

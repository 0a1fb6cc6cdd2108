/* A compressed matrix in the order that the kernels read: the one description of it.

   A matrix of `rows` x `inputs` is cut into tiles of 2 * lanes rows, "lanes" being how many rows one
   vector of the instruction set holds: 16 (AVX-512), 8 (AVX2, plain C), 4 (NEON). A vector holds
   4 consecutive inputs of each of its rows, a byte each: byte 4 * lane + j. The first `lanes` rows
   of a tile are its vector 0, the others its vector 1.

   Inputs are cut into groups of `group` with one scale (float16) and, where `asymmetric`, one zero
   point (uint8) a row: w = scale * (code - zero); symmetric codes have the zero 2^(bits - 1). A
   group is filled up to `span` inputs, a multiple of 16 (of 32 for pairs), with codes that are zero.

   fixed   for every tile and group: scale [2 * lanes], zero [2 * lanes] if asymmetric, then
     dense, for every 4 inputs       INT4: one vector, vector 0 in the low nibbles, 1 in the high;
                                     INT8: vector 0, vector 1
     mask, for every 4 inputs        a bit a byte of vector 0 (lowest first), then of vector 1:
                                     kept or not
     pairs, for every 32 inputs,     one vector of indices, then codes. At most 2 of 4 adjacent
       for vector 0 and 1            inputs are kept; of 8 inputs a row has 4 kept codes, which is
                                     one vector, its place in the four stated by 2 bits. Indices of
                                     inputs 0..7 are bits 0, 1 of their byte, of 8..15 bits 2, 3,
                                     and so on. INT4: inputs 0..7 in low nibbles, 8..15 in high
                                     ones, then 16..31 so; INT8: four vectors
   kept    mask only, for every tile: the kept codes, INT4: those of vector 0 in low nibbles, of
           vector 1 in high ones, each from the tile's start on; INT8: those of the two vectors in
           turn, 4 inputs at a time. `offsets` says where a tile starts and the last one ends
   narrow  mask only, for every tile and group: 1 if no vector of it keeps more than half of its
           bytes, so that half a vector is all that need be read */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define SQFT_MAGIC "SQFTMATR"
#define SQFT_VERSION 1
#define SQFT_LONGEST_GROUP 4096 /* its sum of 8-bit products stays far below 2^31 */
#define SQFT_SLACK 128 /* bytes after the end that a vector load may touch */

enum { SQFT_DENSE, SQFT_MASK, SQFT_PAIRS };

typedef struct {
  char magic[8];
  uint32_t version, format, bits, lanes, asymmetric;
  uint32_t rows, inputs;
  uint32_t stored_group; /* inputs that share a scale in the model */
  uint32_t group;        /* the same or a part of it: activations are rounded by it */
  uint32_t span, groups, tiles;
  uint32_t resident; /* set in memory alone: read where it lies, in huge pages */
  uint64_t group_bytes; /* of the fixed part, scale and zero included */
  uint64_t offsets, narrow, fixed, kept, bytes; /* from the start of this header */
} SqftMatrix;

/* Activations of tokens that are multiplied together, rounded by groups: codes as the kernels lay
   them side by side, of sqft_code_bytes; scale and sum [groups, tokens]. */
typedef struct {
  int8_t *codes;
  float *scale;
  int32_t *sum;
} SqftInputs;

#define SQFT_TOGETHER 8 /* tokens that lie side by side, at most */
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

/* What an instruction set offers: rounding token t of some that are multiplied together to int8,
   products with one token, and with several, which take scratch of so many bytes. */
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

/* Kernels that run here, the best first; `name` picks one of them (NULL: the best). */
const SqftKernels *sqft_kernels(const char *name);

/* Fill in what follows from format, bits, lanes, asymmetric, rows, inputs and stored_group.
   kept: codes kept of every row, for the mask format. 0, or -1 if the shape can't be laid out. */
int sqft_plan(SqftMatrix *m, const uint32_t *kept);
/* Codes that are not zero in every row; 1 if no 4 adjacent inputs have more than 2 of them.
   codes: row major, two a byte for INT4 (low first); `flip` is xored with each. */
int sqft_count(const uint8_t *codes, uint32_t bits, uint32_t flip, const uint8_t *zero,
               uint32_t rows, uint32_t inputs, uint32_t group, uint32_t *kept);
/* Write where the kept codes of every tile go, before the first is packed. */
void sqft_place(SqftMatrix *m, const uint32_t *kept);
/* Lay out tiles `first` to `last` of a planned matrix. zero: NULL if symmetric. */
void sqft_pack(SqftMatrix *m, const uint8_t *codes, uint32_t flip, const uint8_t *zero,
               const uint16_t *scale, size_t first, size_t last);
/* Say which groups are narrow, after all tiles were packed. */
void sqft_seal(SqftMatrix *m);
/* The inverse: codes a byte each [rows, inputs], zero and scale [rows, inputs / stored_group]. */
void sqft_unpack(const SqftMatrix *m, uint8_t *codes, uint8_t *zero, uint16_t *scale);
/* One row as float32 [inputs], as an embedding is looked up. */
void sqft_row(const SqftMatrix *m, size_t row, float *out);
/* 0 if the header and all that follows from it lies within `size` bytes, else -1. */
int sqft_check(const SqftMatrix *m, size_t size);

/* The exact mode: float32 activations [tokens, inputs], y [tokens, rows]. */
void sqft_exact(const SqftMatrix *m, const float *x, size_t tokens, float *y, size_t first,
                size_t last);
/* All rows on one thread. mode 0: one token alone, several at once; 1: one by one; 2: at once;
   3: exact. 0, or -1 without memory. */
int sqft_multiply(const char *name, const SqftMatrix *m, const float *x, size_t tokens, float *y,
                  int mode);

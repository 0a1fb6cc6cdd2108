/* The products, once for all instruction sets.

   Invariant: v_high leaves high nibbles multiplied by HIGH (1 or 16), which saves a shift. All sums
   of vector 1, and for pairs of both vectors, therefore stay multiplied by HIGH until the end,
   where one_of divides them. v_plain removes the factor earlier, when a tile is expanded for several
   tokens.

   A file that includes this one defines

     LANES                    rows per vector
     HIGH                     the factor that v_high leaves in its nibbles: 1 or 16
     SIGNED8                  1 if i_dot8 takes a code c as c - 128
     FLUSH                    products that a sum of nibbles A can hold before a_total
     TOKENS                   tokens multiplied at once
     MATRIX_REGISTERS         several tokens are multiplied by AMX (amx.h); TOKENS is 1
     V, I, F, A               vectors of bytes, int32, float32, and of sums of nibbles
     v_load v_store v_low v_high v_four v_sixteen v_index v_pick v_zero v_one v_equal v_and v_or
     v_not_and, i_*, f_*, a_*, expand4, expand8: plain.c defines the meaning of each. */
#include "matrix.h"
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BYTES (4 * LANES)
#define AHEAD 6144 /* bytes; with 2 KiB memory is not yet read at full speed */
#define PREFETCH(p) __builtin_prefetch((const char *)(p) + AHEAD)

/* Activations of several tokens are interleaved: within each group and each `width` tokens, 4
   inputs of each token alternate. A single token is stored contiguously. */
INLINE size_t width_of(size_t tokens) { return tokens < TOKENS ? tokens : TOKENS; }
INLINE int8_t *place_of(const SqftMatrix *m, const SqftInputs *x, size_t g, size_t t,
                        size_t tokens) {
  const size_t width = width_of(tokens), chunks = (tokens + width - 1) / width;
  return x->codes + (g * chunks + t / width) * width * m->span + t % width * 4;
}

/* Round one group of one token; return the sum of its codes. Compilers vectorize this form: the
   maximum is taken over bit patterns, whose order is that of the absolute values. A product must
   not be contracted with the sum after it. */
INLINE int32_t round_group(const float *restrict in, size_t group, size_t span, float *scale,
                           int8_t *restrict codes) {
  const float shift = 12582912.f; /* 1.5 * 2^23: adding it rounds, to nearest even */
  uint32_t largest = 0;
  for (size_t i = 0; i < group; i++) {
    uint32_t bits;
    memcpy(&bits, in + i, 4);
    bits &= 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  float most;
  memcpy(&most, &largest, 4);
  const float factor = most > 0 ? 127.f / most : 0;
  int32_t sum = 0;
  for (size_t i = 0; i < group; i++) {
    float moved = in[i] * factor + shift;
    int32_t code;
    memcpy(&code, &moved, 4);
    code -= 0x4B400000;
    codes[i] = (int8_t)code;
    sum += code;
  }
  memset(codes + group, 0, span - group);
  *scale = most / 127.f;
  return sum;
}

static void rounded(const SqftMatrix *m, const float *x, size_t t, size_t tokens,
                    SqftInputs *out) {
  const size_t group = m->group, span = m->span, width = width_of(tokens);
  for (size_t g = 0; g < m->groups; g++) {
    int8_t *codes = place_of(m, out, g, t, tokens);
    float *scale = out->scale + g * tokens + t;
    int32_t *sum = out->sum + g * tokens + t;
    if (width == 1) {
      *sum = round_group(x + g * group, group, span, scale, codes);
      continue;
    }
    int8_t alone[SQFT_LONGEST_GROUP];
    *sum = round_group(x + g * group, group, span, scale, alone);
    for (size_t i = 0; i < span; i += 4) memcpy(codes + i * width, alone + i, 4);
  }
}

/* Products of one group, over `steps` times 4 inputs: out[0] of vector 0, out[1] of vector 1
   (multiplied by HIGH if the codes are nibbles). */

INLINE void dense4(const uint8_t *p, const int8_t *q, int steps, I out[2]) {
  out[0] = out[1] = i_set(0);
  for (int i = 0; i < steps; i += 2 * FLUSH) {
    A a0 = a_zero(), a1 = a_zero(), b0 = a_zero(), b1 = a_zero();
    int stop = i + 2 * FLUSH < steps ? i + 2 * FLUSH : steps;
    for (int s = i; s < stop; s += 2, p += 2 * BYTES) {
      V v = v_load(p), u = v_load(p + BYTES), x = v_four(q + 4 * s), z = v_four(q + 4 * s + 4);
      PREFETCH(p);
      if (BYTES > 32) PREFETCH(p + BYTES);
      a0 = a_dot(a0, v_low(v), x);
      a1 = a_dot(a1, v_high(v), x);
      b0 = a_dot(b0, v_low(u), z);
      b1 = a_dot(b1, v_high(u), z);
    }
    out[0] = a_total(a_total(out[0], a0), b0);
    out[1] = a_total(a_total(out[1], a1), b1);
  }
}

INLINE void dense8(const uint8_t *p, const int8_t *q, int steps, I out[2]) {
  I c0 = i_set(0), c1 = c0, d0 = c0, d1 = c0;
  for (int s = 0; s < steps; s += 2, p += 4 * BYTES) {
    V x = v_four(q + 4 * s), z = v_four(q + 4 * s + 4);
    PREFETCH(p);
    PREFETCH(p + 2 * BYTES);
    if (BYTES > 32) {
      PREFETCH(p + BYTES);
      PREFETCH(p + 3 * BYTES);
    }
    c0 = i_dot8(c0, v_load(p), x);
    c1 = i_dot8(c1, v_load(p + BYTES), x);
    d0 = i_dot8(d0, v_load(p + 2 * BYTES), z);
    d1 = i_dot8(d1, v_load(p + 3 * BYTES), z);
  }
  out[0] = i_add(c0, d0);
  out[1] = i_add(c1, d1);
}

/* The next kept codes of a tile: of vector 0 and, for nibbles, of vector 1. */
typedef struct {
  const uint8_t *at[2];
} Stream;

INLINE Stream stream_of(const SqftMatrix *m, size_t tile, const int format) {
  Stream kept = {{0, 0}};
  if (format == SQFT_MASK) kept.at[0] = kept.at[1] = sqft_kept(m, tile);
  return kept;
}

INLINE void mask4(const uint8_t *p, Stream *kept, const int8_t *q, int steps, int narrow, V z0,
                  V z1, I out[2]) {
  out[0] = out[1] = i_set(0);
  for (int i = 0; i < steps; i += FLUSH) {
    A a0 = a_zero(), a1 = a_zero(), b0 = a_zero(), b1 = a_zero();
    int stop = i + FLUSH < steps ? i + FLUSH : steps;
    PREFETCH(kept->at[0]);
    for (int s = i; s < stop; s += 2, p += 2 * LANES) {
      V v0, v1, x = v_four(q + 4 * s), z = v_four(q + 4 * s + 4);
      if (BYTES > 32 || s % 4 == 0) PREFETCH(p);
      if (BYTES > 32) PREFETCH(kept->at[0]);
      expand4(p, kept->at, narrow, z0, z1, &v0, &v1);
      a0 = a_dot(a0, v0, x);
      a1 = a_dot(a1, v1, x);
      expand4(p + LANES, kept->at, narrow, z0, z1, &v0, &v1);
      b0 = a_dot(b0, v0, z);
      b1 = a_dot(b1, v1, z);
    }
    out[0] = a_total(a_total(out[0], a0), b0);
    out[1] = a_total(a_total(out[1], a1), b1);
  }
}

INLINE void mask8(const uint8_t *p, Stream *kept, const int8_t *q, int steps, V z0, V z1,
                  I out[2]) {
  I c0 = i_set(0), c1 = c0, d0 = c0, d1 = c0;
  for (int s = 0; s < steps; s += 2, p += 2 * LANES) {
    V v0, v1, x = v_four(q + 4 * s), z = v_four(q + 4 * s + 4);
    if (BYTES > 32 || s % 4 == 0) PREFETCH(p);
    PREFETCH(kept->at[0]);
    if (BYTES > 32) PREFETCH(kept->at[0] + 64);
    expand8(p, kept->at, z0, z1, &v0, &v1);
    c0 = i_dot8(c0, v0, x);
    c1 = i_dot8(c1, v1, x);
    expand8(p + LANES, kept->at, z0, z1, &v0, &v1);
    d0 = i_dot8(d0, v0, z);
    d1 = i_dot8(d1, v1, z);
  }
  out[0] = i_add(c0, d0);
  out[1] = i_add(c1, d1);
}

/* Products of one vector. The zero point is subtracted here, so the result needs no correction. */
INLINE I pairs4(const uint8_t *p, size_t stride, const int8_t *q, int span, I zero) {
  I out = i_set(0), low = out, picked = out;
  const V one = v_one();
  for (int i = 0; i < span; i += 32, p += stride) {
    V index = v_load(p), v = v_load(p + BYTES), u = v_load(p + 2 * BYTES);
    V x = v_sixteen(q + i), z = v_sixteen(q + i + 16);
    V x0 = v_pick(x, v_index(index, 0)), x1 = v_pick(x, v_index(index, 1));
    V z0 = v_pick(z, v_index(index, 2)), z1 = v_pick(z, v_index(index, 3));
    PREFETCH(p);
    PREFETCH(p + 64);
    A a = a_dot(a_dot(a_zero(), v_low(v), x0), v_low(u), z0);
    A b = a_dot(a_dot(a_zero(), v_high(v), x1), v_high(u), z1);
    A d = a_dot(a_dot(a_dot(a_dot(a_zero(), one, x0), one, x1), one, z0), one, z1);
    low = a_total(low, a);
    out = a_total(out, b);
    picked = a_total(picked, d);
  }
  return i_sub(i_add(i_high(low), out), i_high(i_mul(zero, picked)));
}

INLINE I pairs8(const uint8_t *p, size_t stride, const int8_t *q, int span, I zero) {
  I out = i_set(0), other = out, picked = out;
  const V one = v_one();
  for (int i = 0; i < span; i += 32, p += stride) {
    V index = v_load(p), x = v_sixteen(q + i), z = v_sixteen(q + i + 16);
    V x0 = v_pick(x, v_index(index, 0)), x1 = v_pick(x, v_index(index, 1));
    V z0 = v_pick(z, v_index(index, 2)), z1 = v_pick(z, v_index(index, 3));
    PREFETCH(p);
    PREFETCH(p + 64);
    PREFETCH(p + 128);
    out = i_dot8(out, v_load(p + BYTES), x0);
    other = i_dot8(other, v_load(p + 2 * BYTES), x1);
    out = i_dot8(out, v_load(p + 3 * BYTES), z0);
    other = i_dot8(other, v_load(p + 4 * BYTES), z1);
    A d = a_dot(a_dot(a_dot(a_dot(a_zero(), one, x0), one, x1), one, z0), one, z1);
    picked = a_total(picked, d);
  }
  return i_sub(i_add(out, other), i_mul(i_sub(zero, i_set(128 * SIGNED8)), picked));
}

/* Scale and zero of one group of a tile. */
typedef struct {
  F scale[2];
  I zero[2];
  V bytes[2]; /* the zero point, repeated for each code */
} Group;

INLINE Group head_of(const uint8_t *p, int asymmetric, int bits) {
  const int middle = 1 << (bits - 1);
  Group g = {{f_half(p), f_half(p + 2 * LANES)},
             {i_set(middle), i_set(middle)},
             {v_set(middle), v_set(middle)}};
  if (asymmetric) {
    p += 4 * LANES;
    g.zero[0] = i_bytes(p), g.zero[1] = i_bytes(p + LANES);
    g.bytes[0] = v_zero(p), g.bytes[1] = v_zero(p + LANES);
  }
  return g;
}

/* The part of a group's sums that comes from the zero point, which every code contains. */
INLINE I zeros_of(const SqftMatrix *m, const Group *group, int v, int32_t sum, const int bits) {
  const int offset = bits == 8 ? 128 * SIGNED8 : 0;
  if (!m->asymmetric) return i_set(sum * ((1 << (bits - 1)) - offset));
  return i_mul(i_sub(group->zero[v], i_set(offset)), i_set(sum));
}

INLINE void store_rows(const SqftMatrix *m, size_t tile, float *y, F f0, F f1) {
  size_t row = tile * 2 * LANES;
  if (row + 2 * LANES <= m->rows) {
    f_store(y + row, f0);
    f_store(y + row + LANES, f1);
    return;
  }
  float rest[2 * LANES];
  f_store(rest, f0);
  f_store(rest + LANES, f1);
  memcpy(y + row, rest, (m->rows - row) * sizeof(float));
}

INLINE void one_of(const SqftMatrix *m, const SqftInputs *x, float *y, size_t first, size_t last,
                   const int format, const int bits) {
  const int steps = (int)m->span / 4;
  const size_t head = sqft_head_bytes(m);
  const size_t stride = (size_t)(bits == 4 ? 3 : 5) * 2 * BYTES;
  for (size_t tile = first; tile < last; tile++) {
    const uint8_t *p = sqft_fixed(m, tile);
    const uint8_t *narrow = (const uint8_t *)m + m->narrow + tile * m->groups;
    Stream kept = stream_of(m, tile, format);
    F f0 = f_zero(), f1 = f_zero();
    for (uint32_t g = 0; g < m->groups; g++, p += m->group_bytes) {
      const int8_t *q = x->codes + (size_t)g * m->span;
      Group group = head_of(p, (int)m->asymmetric, bits);
      I out[2];
      PREFETCH(p);
      if (format == SQFT_PAIRS) {
        for (int v = 0; v < 2; v++)
          out[v] = bits == 4 ? pairs4(p + head + (size_t)v * stride / 2, stride, q, (int)m->span,
                                      group.zero[v])
                             : pairs8(p + head + (size_t)v * stride / 2, stride, q, (int)m->span,
                                      group.zero[v]);
      } else {
        if (format == SQFT_DENSE && bits == 4) dense4(p + head, q, steps, out);
        if (format == SQFT_DENSE && bits == 8) dense8(p + head, q, steps, out);
        if (format == SQFT_MASK && bits == 4) {
          if (NARROW_READS && narrow[g])
            mask4(p + head, &kept, q, steps, 1, group.bytes[0], group.bytes[1], out);
          else
            mask4(p + head, &kept, q, steps, 0, group.bytes[0], group.bytes[1], out);
        }
        if (format == SQFT_MASK && bits == 8)
          mask8(p + head, &kept, q, steps, group.bytes[0], group.bytes[1], out);
        I other = zeros_of(m, &group, 1, x->sum[g], bits);
        out[0] = i_sub(out[0], zeros_of(m, &group, 0, x->sum[g], bits));
        out[1] = i_sub(out[1], bits == 4 ? i_high(other) : other);
      }
      F a = f_set(x->scale[g]);
      f0 = f_fma(f_of(out[0]), f_mul(group.scale[0], a), f0);
      f1 = f_fma(f_of(out[1]), f_mul(group.scale[1], a), f1);
    }
    /* remove the factor HIGH: from vector 1; for pairs from both */
    if (bits == 4 && HIGH != 1) f1 = f_mul(f1, f_set(1.f / HIGH));
    if (bits == 4 && HIGH != 1 && format == SQFT_PAIRS) f0 = f_mul(f0, f_set(1.f / HIGH));
    store_rows(m, tile, y, f0, f1);
  }
}

static void one(const SqftMatrix *m, const SqftInputs *x, float *y, size_t first, size_t last) {
  switch (m->format * 16 + m->bits) {
  case SQFT_DENSE * 16 + 4: one_of(m, x, y, first, last, SQFT_DENSE, 4); break;
  case SQFT_DENSE * 16 + 8: one_of(m, x, y, first, last, SQFT_DENSE, 8); break;
  case SQFT_MASK * 16 + 4: one_of(m, x, y, first, last, SQFT_MASK, 4); break;
  case SQFT_MASK * 16 + 8: one_of(m, x, y, first, last, SQFT_MASK, 8); break;
  case SQFT_PAIRS * 16 + 4: one_of(m, x, y, first, last, SQFT_PAIRS, 4); break;
  case SQFT_PAIRS * 16 + 8: one_of(m, x, y, first, last, SQFT_PAIRS, 8); break;
  }
}

/* Prompts and batches: a group of a tile is expanded once to one byte per code (for every 4 inputs
   vector 0, then vector 1), and multiplied with all tokens from the nearest cache. */

INLINE void spread_pair(V code, V index, int field, V zero, uint8_t *out, size_t stride) {
  /* 8 inputs from 8 * field on: two fours, each with 2 kept codes and their positions */
  for (int quad = 0; quad < 2; quad++) {
    V c0 = v_pick(code, v_spread(2 * quad)), c1 = v_pick(code, v_spread(2 * quad + 1));
    V at = v_place(index, field);
    V e0 = v_equal(v_pick(at, v_spread(2 * quad)), v_count());
    V e1 = v_equal(v_pick(at, v_spread(2 * quad + 1)), v_count());
    V some = v_or(v_and(c0, e0), v_and(c1, e1));
    v_store(out + (size_t)(2 * field + quad) * stride, v_or(some, v_not_and(v_or(e0, e1), zero)));
  }
}

INLINE void widen_pairs(const uint8_t *p, int span, const Group *group, uint8_t *out, int bits) {
  for (int i = 0; i < span; i += 32, out += 16 * BYTES)
    for (int v = 0; v < 2; v++) {
      V index = v_load(p);
      for (int field = 0; field < 4; field++) {
        V code = v_load(p + (1 + (bits == 4 ? field / 2 : field)) * BYTES);
        if (bits == 4) code = field % 2 ? v_plain(v_high(code)) : v_low(code);
        spread_pair(code, index, field, group->bytes[v], out + v * BYTES, 2 * BYTES);
      }
      p += (bits == 4 ? 3 : 5) * BYTES;
    }
}

INLINE void widen(const uint8_t *p, Stream *kept, const Group *group, int span, uint8_t *out,
                  const int format, const int bits) {
  if (format == SQFT_PAIRS) {
    widen_pairs(p, span, group, out, bits);
    return;
  }
  for (int s = 0; s < span / 4; s++, out += 2 * BYTES) {
    V v0, v1;
    if (format == SQFT_DENSE) {
      V v = v_load(p + s * BYTES);
      v0 = v_low(v), v1 = v_plain(v_high(v));
    } else if (bits == 4) {
      PREFETCH(kept->at[0]);
      expand4(p + s * LANES, kept->at, 0, group->bytes[0], group->bytes[1], &v0, &v1);
      v1 = v_plain(v1);
    } else {
      PREFETCH(kept->at[0]);
      expand8(p + s * LANES, kept->at, group->bytes[0], group->bytes[1], &v0, &v1);
    }
    v_store(out, v0);
    v_store(out + BYTES, v1);
  }
}

/* Return an expanded group. Dense INT8 needs no expansion; other formats are expanded into `wide`.
   p: the group's head. */
INLINE const uint8_t *widened(const SqftMatrix *m, const uint8_t *p, Stream *kept,
                              const Group *group, uint8_t *wide, const int format,
                              const int bits) {
  if (!(format == SQFT_DENSE && bits == 8))
    for (size_t i = 0; i < m->group_bytes; i += 64) PREFETCH(p + i);
  p += sqft_head_bytes(m);
  if (format == SQFT_DENSE && bits == 8) return p;
  widen(p, kept, group, (int)m->span, wide, format, bits);
  return wide;
}

INLINE uint8_t *aligned(uint8_t *p) { return (uint8_t *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

#ifdef MATRIX_REGISTERS
#include "amx.h"
#else
/* Sums of one expanded group with `count` tokens, which are interleaved by `width`. */
INLINE void wide_group(const uint8_t *p, const int8_t *q, size_t width, int steps, const int bits,
                       const int count, I out[TOKENS][2]) {
  for (int t = 0; t < count; t++) out[t][0] = out[t][1] = i_set(0);
  if (bits == 8 || !SIGNED8) { /* i_dot8 also takes nibbles */
    for (int s = 0; s < steps; s++, p += 2 * BYTES, q += 4 * width) {
      V v = v_load(p), u = v_load(p + BYTES);
      for (int t = 0; t < count; t++) {
        V x = v_four(q + 4 * t);
        out[t][0] = i_dot8(out[t][0], v, x);
        out[t][1] = i_dot8(out[t][1], u, x);
      }
    }
    return;
  }
  for (int i = 0; i < steps; i += FLUSH) {
    A a[TOKENS][2];
    for (int t = 0; t < count; t++) a[t][0] = a[t][1] = a_zero();
    int stop = i + FLUSH < steps ? i + FLUSH : steps;
    for (int s = i; s < stop; s++, p += 2 * BYTES, q += 4 * width) {
      V v = v_load(p), u = v_load(p + BYTES);
      for (int t = 0; t < count; t++) {
        V x = v_four(q + 4 * t);
        a[t][0] = a_dot(a[t][0], v, x);
        a[t][1] = a_dot(a[t][1], u, x);
      }
    }
    for (int t = 0; t < count; t++) {
      out[t][0] = a_total(out[t][0], a[t][0]);
      out[t][1] = a_total(out[t][1], a[t][1]);
    }
  }
}

INLINE void wide_tokens(const SqftMatrix *m, const SqftInputs *x, size_t g, size_t first,
                        size_t tokens, const uint8_t *wide, const Group *group, F (*f)[2],
                        const int bits, const int count) {
  const int8_t *q = place_of(m, x, g, first, tokens);
  I out[TOKENS][2];
  wide_group(wide, q, width_of(tokens), (int)m->span / 4, bits, count, out);
  for (int t = 0; t < count; t++) {
    const size_t at = g * tokens + first + (size_t)t;
    F a = f_set(x->scale[at]);
    for (int v = 0; v < 2; v++) {
      I taken = i_sub(out[t][v], zeros_of(m, group, v, x->sum[at], bits));
      f[t][v] = f_fma(f_of(taken), f_mul(group->scale[v], a), f[t][v]);
    }
  }
}

/* The sums of all tokens, and the current group, stay in the caches. */
INLINE void many_of(const SqftMatrix *m, const SqftInputs *x, size_t tokens, float *y,
                    size_t first, size_t last, uint8_t *scratch, const int format,
                    const int bits) {
  F(*f)[2] = (F(*)[2])aligned(scratch);
  uint8_t *wide = (uint8_t *)(f + tokens);
  for (size_t tile = first; tile < last; tile++) {
    const uint8_t *p = sqft_fixed(m, tile);
    Stream kept = stream_of(m, tile, format);
    for (size_t t = 0; t < tokens; t++) f[t][0] = f[t][1] = f_zero();
    for (size_t g = 0; g < m->groups; g++, p += m->group_bytes) {
      Group group = head_of(p, (int)m->asymmetric, bits);
      const uint8_t *from = widened(m, p, &kept, &group, wide, format, bits);
      size_t t = 0;
      for (; t + TOKENS <= tokens; t += TOKENS)
        wide_tokens(m, x, g, t, tokens, from, &group, f + t, bits, TOKENS);
      if (TOKENS > 4 && tokens - t >= 4)
        wide_tokens(m, x, g, t, tokens, from, &group, f + t, bits, 4), t += 4;
      if (tokens - t >= 2)
        wide_tokens(m, x, g, t, tokens, from, &group, f + t, bits, 2), t += 2;
      if (tokens > t) wide_tokens(m, x, g, t, tokens, from, &group, f + t, bits, 1);
    }
    for (size_t t = 0; t < tokens; t++) store_rows(m, tile, y + t * m->rows, f[t][0], f[t][1]);
  }
}

static size_t scratch_bytes(const SqftMatrix *m, size_t tokens) {
  return 64 + tokens * 2 * sizeof(F) + (size_t)m->span * 2 * BYTES / 4;
}
#endif

static void many(const SqftMatrix *m, const SqftInputs *x, size_t tokens, float *y, size_t first,
                 size_t last, uint8_t *scratch) {
  switch (m->format * 16 + m->bits) {
  case SQFT_DENSE * 16 + 4: many_of(m, x, tokens, y, first, last, scratch, SQFT_DENSE, 4); break;
  case SQFT_DENSE * 16 + 8: many_of(m, x, tokens, y, first, last, scratch, SQFT_DENSE, 8); break;
  case SQFT_MASK * 16 + 4: many_of(m, x, tokens, y, first, last, scratch, SQFT_MASK, 4); break;
  case SQFT_MASK * 16 + 8: many_of(m, x, tokens, y, first, last, scratch, SQFT_MASK, 8); break;
  case SQFT_PAIRS * 16 + 4: many_of(m, x, tokens, y, first, last, scratch, SQFT_PAIRS, 4); break;
  case SQFT_PAIRS * 16 + 8: many_of(m, x, tokens, y, first, last, scratch, SQFT_PAIRS, 8); break;
  }
}

/* Pack and unpack matrices for any instruction set, and multiply without rounding. */
#include "matrix.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static int middle(const SqftMatrix *m) { return 1 << (m->bits - 1); }
static uint8_t *bytes_of(SqftMatrix *m, uint64_t at) { return (uint8_t *)m + at; }
static size_t vector_bytes(const SqftMatrix *m) { return 4 * (size_t)m->lanes; }

/* Activations are rounded in groups of at most 128 inputs. Scales of larger groups are repeated. */
static uint32_t kernel_group(uint32_t stored) {
  if (stored <= 128) return stored;
  for (uint32_t g = 128; g >= 16; g /= 2)
    if (stored % g == 0) return g;
  return stored;
}

static size_t step_bytes(const SqftMatrix *m) {
  size_t v = vector_bytes(m);
  if (m->format == SQFT_MASK) return v / 4;
  if (m->format == SQFT_DENSE) return m->bits == 4 ? v : 2 * v;
  return 2 * (v + (m->bits == 4 ? 2 : 4) * v) / 8; /* pairs: 8 steps share their vectors */
}

int sqft_plan(SqftMatrix *m, const uint32_t *kept) {
  if ((m->bits != 4 && m->bits != 8) || m->format > SQFT_PAIRS || !m->rows || !m->inputs) return -1;
  if (m->lanes != 4 && m->lanes != 8 && m->lanes != 16) return -1;
  if (!m->stored_group || m->inputs % m->stored_group) return -1;
  memcpy(m->magic, SQFT_MAGIC, 8);
  m->version = SQFT_VERSION;
  m->group = kernel_group(m->stored_group);
  if (m->group > SQFT_LONGEST_GROUP) return -1;
  m->span = (uint32_t)up(m->group, m->format == SQFT_PAIRS ? 32 : 16);
  m->groups = m->inputs / m->group;
  m->tiles = (uint32_t)(up(m->rows, sqft_tile_rows(m)) / sqft_tile_rows(m));
  m->group_bytes = sqft_head_bytes(m) + m->span / 4 * step_bytes(m);
  m->offsets = up(sizeof(SqftMatrix), 64);
  m->narrow = m->offsets;
  size_t flags = 0;
  if (m->format == SQFT_MASK) {
    m->narrow += 8 * ((size_t)m->tiles + 1);
    flags = (size_t)m->tiles * m->groups;
  }
  m->fixed = up(m->narrow + flags, 64);
  m->kept = up(m->fixed + m->tiles * sqft_tile_bytes(m), 64);
  m->bytes = m->kept + SQFT_SLACK;
  if (m->format != SQFT_MASK || !kept) return 0;
  size_t rows = sqft_tile_rows(m);
  for (size_t tile = 0; tile < m->tiles; tile++) {
    size_t count[2] = {0, 0};
    for (size_t r = 0; r < rows && tile * rows + r < m->rows; r++)
      count[r / m->lanes] += kept[tile * rows + r];
    m->bytes += m->bits == 8 ? count[0] + count[1] : count[0] > count[1] ? count[0] : count[1];
  }
  return 0;
}

void sqft_place(SqftMatrix *m, const uint32_t *kept) {
  if (m->format != SQFT_MASK) return;
  uint64_t *offset = (uint64_t *)bytes_of(m, m->offsets);
  size_t rows = sqft_tile_rows(m);
  offset[0] = 0;
  for (size_t tile = 0; tile < m->tiles; tile++) {
    size_t count[2] = {0, 0};
    for (size_t r = 0; r < rows && tile * rows + r < m->rows; r++)
      count[r / m->lanes] += kept[tile * rows + r];
    offset[tile + 1] = offset[tile] + (m->bits == 8            ? count[0] + count[1]
                                       : count[0] > count[1] ? count[0]
                                                             : count[1]);
  }
}

/* Read one row, one code per byte. */
static void read_row(const uint8_t *codes, uint32_t bits, uint32_t flip, size_t row, size_t inputs,
                     uint8_t *out) {
  size_t at = row * inputs;
  if (bits == 8) {
    for (size_t i = 0; i < inputs; i++) out[i] = codes[at + i] ^ flip;
    return;
  }
  if (at % 2 == 0) { /* the compiler vectorizes this loop */
    const uint8_t *pairs = codes + at / 2;
    for (size_t i = 0; i < inputs / 2; i++) {
      out[2 * i] = (pairs[i] & 15) ^ flip;
      out[2 * i + 1] = (pairs[i] >> 4) ^ flip;
    }
    if (inputs % 2) out[inputs - 1] = (pairs[inputs / 2] & 15) ^ flip;
    return;
  }
  for (size_t i = 0; i < inputs; i++)
    out[i] = ((codes[(at + i) / 2] >> ((at + i) % 2 * 4)) & 15) ^ flip;
}

int sqft_count(const uint8_t *codes, uint32_t bits, uint32_t flip, const uint8_t *zero,
               uint32_t rows, uint32_t inputs, uint32_t group, uint32_t *kept) {
  uint8_t *row = malloc(inputs);
  int pairs = group % 4 == 0;
  for (uint32_t r = 0; r < rows; r++) {
    read_row(codes, bits, flip, r, inputs, row);
    uint32_t count = 0;
    for (uint32_t g = 0; g < inputs / group; g++) {
      const uint8_t *part = row + (size_t)g * group;
      uint8_t z = zero ? zero[(size_t)r * (inputs / group) + g] : 1 << (bits - 1);
      uint32_t of_group = 0;
      for (uint32_t i = 0; i < group; i++) of_group += part[i] != z;
      count += of_group;
      if (pairs && of_group > group / 2) pairs = 0;
      for (uint32_t i = 0; pairs && i < group; i += 4)
        pairs = (part[i] != z) + (part[i + 1] != z) + (part[i + 2] != z) + (part[i + 3] != z) <= 2;
    }
    kept[r] = count;
  }
  free(row);
  return pairs;
}

/* An unpacked tile: codes [2 * lanes][inputs]. Rows past the end are zero, with scale zero. */
typedef struct {
  uint8_t *codes, *zero;
  uint16_t *scale;
} Tile;

static Tile new_tile(const SqftMatrix *m) {
  size_t rows = sqft_tile_rows(m);
  Tile tile = {malloc(rows * m->inputs), malloc(rows * m->groups), malloc(2 * rows * m->groups)};
  return tile;
}

static void free_tile(Tile tile) {
  free(tile.codes);
  free(tile.zero);
  free(tile.scale);
}

static void read_tile(const SqftMatrix *m, const uint8_t *codes, uint32_t flip, const uint8_t *zero,
                      const uint16_t *scale, size_t tile, Tile out) {
  size_t rows = sqft_tile_rows(m), stored = m->inputs / m->stored_group;
  for (size_t r = 0; r < rows; r++) {
    size_t row = tile * rows + r;
    if (row < m->rows)
      read_row(codes, m->bits, flip, row, m->inputs, out.codes + r * m->inputs);
    else
      memset(out.codes + r * m->inputs, middle(m), m->inputs);
    for (size_t g = 0; g < m->groups; g++) {
      size_t from = row * stored + g * m->group / m->stored_group;
      out.zero[r * m->groups + g] = zero && row < m->rows ? zero[from] : middle(m);
      out.scale[r * m->groups + g] = row < m->rows ? scale[from] : 0;
    }
  }
}

/* Return code `input` of a group, or its zero point past the end of the group. */
static uint8_t code_at(const SqftMatrix *m, Tile t, size_t row, size_t g, size_t input) {
  if (input >= m->group) return t.zero[row * m->groups + g];
  return t.codes[row * m->inputs + g * m->group + input];
}

static void pack_dense(const SqftMatrix *m, Tile t, size_t g, uint8_t *out) {
  const size_t lanes = m->lanes, v = vector_bytes(m), step = step_bytes(m);
  for (size_t lane = 0; lane < lanes; lane++) {
    const uint8_t *one = t.codes + lane * m->inputs + g * m->group, *other = one + lanes * m->inputs;
    uint8_t *to = out + 4 * lane;
    size_t i = 0;
    for (; i + 4 <= m->group; i += 4, to += step) {
      uint32_t a, b;
      memcpy(&a, one + i, 4), memcpy(&b, other + i, 4);
      if (m->bits == 4)
        a |= b << 4, memcpy(to, &a, 4); /* codes are below 16 */
      else
        memcpy(to, &a, 4), memcpy(to + v, &b, 4);
    }
    for (; i < m->span; i += 4, to += step)
      for (size_t j = 0; j < 4; j++) {
        uint8_t a = code_at(m, t, lane, g, i + j), b = code_at(m, t, lanes + lane, g, i + j);
        to[j] = (uint8_t)(m->bits == 4 ? a | b << 4 : a);
        if (m->bits == 8) to[v + j] = b;
      }
  }
}

/* Append kept codes to streams, one byte each: INT4 has one stream for each half. There is no
   branch: the next code overwrites one that is not kept. */
static void pack_mask(const SqftMatrix *m, Tile t, size_t g, uint8_t *out, uint8_t *stream[2],
                      size_t at[2]) {
  for (size_t i = 0; i < m->span; i += 4)
    for (size_t half = 0; half < 2; half++, out += m->lanes / 2) {
      const size_t which = m->bits == 8 ? 0 : half;
      uint8_t *to = stream[which] + at[which];
      for (size_t lane = 0; lane < m->lanes; lane++) {
        const size_t row = half * m->lanes + lane;
        const uint8_t zero = t.zero[row * m->groups + g];
        const uint8_t *in = t.codes + row * m->inputs + g * m->group + i;
        uint8_t padded[4];
        uint32_t bits = 0;
        if (i + 4 > m->group) {
          for (size_t j = 0; j < 4; j++) padded[j] = code_at(m, t, row, g, i + j);
          in = padded;
        }
        for (size_t j = 0; j < 4; j++) {
          const uint32_t is_kept = in[j] != zero;
          *to = in[j];
          to += is_kept;
          bits |= is_kept << j;
        }
        if (lane % 2)
          out[lane / 2] |= (uint8_t)(bits << 4);
        else
          out[lane / 2] = (uint8_t)bits;
      }
      at[which] = (size_t)(to - stream[which]);
    }
}

/* Write the streams of a tile: INT4 in the low and high nibbles of the same bytes. */
static void join_streams(const SqftMatrix *m, uint8_t *const stream[2], const size_t at[2],
                         uint8_t *kept) {
  if (m->bits == 8) {
    memcpy(kept, stream[0], at[0]);
    return;
  }
  const size_t both = at[0] < at[1] ? at[0] : at[1];
  for (size_t i = 0; i < both; i++) kept[i] = (uint8_t)(stream[0][i] | stream[1][i] << 4);
  for (size_t i = both; i < at[0]; i++) kept[i] = stream[0][i];
  for (size_t i = both; i < at[1]; i++) kept[i] = (uint8_t)(stream[1][i] << 4);
}

static void pack_pairs(const SqftMatrix *m, Tile t, size_t g, uint8_t *out) {
  size_t v = vector_bytes(m), parts = m->bits == 4 ? 2 : 4;
  for (size_t i = 0; i < m->span; i += 32)
    for (size_t half = 0; half < 2; half++, out += (1 + parts) * v) {
      memset(out, 0, (1 + parts) * v);
      for (size_t lane = 0; lane < m->lanes; lane++)
        for (size_t quad = 0; quad < 8; quad++) {
          size_t row = half * m->lanes + lane, field = quad / 2, found = 0;
          uint8_t zero = t.zero[row * m->groups + g], place[2], code[2] = {zero, zero};
          for (uint8_t j = 0; j < 4; j++) {
            uint8_t one = code_at(m, t, row, g, i + 4 * quad + j);
            if (one != zero && found < 2) place[found] = j, code[found++] = one;
          }
          /* unused slots get a free position and the code zero */
          for (uint8_t j = 0; found < 2; j++)
            if (!found || place[0] != j) place[found++] = j;
          for (size_t k = 0; k < 2; k++) {
            size_t at = 4 * lane + quad % 2 * 2 + k;
            out[at] |= (uint8_t)(place[k] << 2 * field);
            if (m->bits == 8)
              out[(1 + field) * v + at] = code[k];
            else
              out[(1 + field / 2) * v + at] |= (uint8_t)(code[k] << field % 2 * 4);
          }
        }
    }
}

void sqft_pack(SqftMatrix *m, const uint8_t *codes, uint32_t flip, const uint8_t *zero,
               const uint16_t *scale, size_t first, size_t last) {
  Tile t = new_tile(m);
  size_t rows = sqft_tile_rows(m);
  uint8_t *stream[2] = {0, 0};
  if (m->format == SQFT_MASK)
    for (int half = 0; half < 2; half++) stream[half] = malloc(rows * m->inputs + 1);
  for (size_t tile = first; tile < last; tile++) {
    read_tile(m, codes, flip, zero, scale, tile, t);
    uint8_t *out = (uint8_t *)sqft_fixed(m, tile);
    size_t at[2] = {0, 0};
    for (size_t g = 0; g < m->groups; g++, out += m->group_bytes) {
      for (size_t r = 0; r < rows; r++) {
        memcpy(out + 2 * r, t.scale + r * m->groups + g, 2);
        if (m->asymmetric) out[2 * rows + r] = t.zero[r * m->groups + g];
      }
      uint8_t *body = out + sqft_head_bytes(m);
      if (m->format == SQFT_DENSE) pack_dense(m, t, g, body);
      if (m->format == SQFT_MASK) pack_mask(m, t, g, body, stream, at);
      if (m->format == SQFT_PAIRS) pack_pairs(m, t, g, body);
    }
    if (m->format == SQFT_MASK) join_streams(m, stream, at, (uint8_t *)sqft_kept(m, tile));
  }
  free(stream[0]), free(stream[1]);
  free_tile(t);
}

/* Count the set bits in the mask of one vector: 2, 4 or 8 bytes. */
static size_t ones(const uint8_t *bytes, size_t n) {
  uint64_t word = 0;
  memcpy(&word, bytes, n);
  return (size_t)__builtin_popcountll(word);
}

void sqft_seal(SqftMatrix *m) {
  if (m->format != SQFT_MASK) return;
  uint8_t *narrow = bytes_of(m, m->narrow);
  for (size_t i = 0; i < (size_t)m->tiles * m->groups; i++) {
    const uint8_t *mask = bytes_of(m, m->fixed + i * m->group_bytes + sqft_head_bytes(m));
    narrow[i] = 1;
    for (size_t v = 0; v < m->span / 2; v++)
      if (ones(mask + v * (m->lanes / 2), m->lanes / 2) > 2 * m->lanes) narrow[i] = 0;
  }
}

static void unpack_mask(const SqftMatrix *m, const uint8_t *in, const uint8_t *kept, size_t at[2],
                        size_t g, Tile t) {
  for (size_t i = 0; i < m->span; i += 4)
    for (size_t half = 0; half < 2; half++, in += m->lanes / 2)
      for (size_t place = 0; place < vector_bytes(m); place++) {
        if (!(in[place / 8] >> place % 8 & 1)) continue;
        size_t row = half * m->lanes + place / 4, input = i + place % 4;
        uint8_t code = m->bits == 8 ? kept[at[0]++] : kept[at[half]++] >> 4 * half & 15;
        if (input < m->group) t.codes[row * m->inputs + g * m->group + input] = code;
      }
}

static void unpack_other(const SqftMatrix *m, const uint8_t *in, size_t g, Tile t) {
  size_t v = vector_bytes(m), parts = m->bits == 4 ? 2 : 4;
  for (size_t row = 0; row < sqft_tile_rows(m); row++)
    for (size_t i = 0; i < m->group; i++) {
      size_t half = row / m->lanes, lane = row % m->lanes;
      uint8_t *out = t.codes + row * m->inputs + g * m->group + i;
      if (m->format == SQFT_DENSE) {
        const uint8_t *step = in + i / 4 * step_bytes(m);
        size_t at = 4 * lane + i % 4;
        *out = m->bits == 4 ? step[at] >> 4 * half & 15 : step[half * v + at];
        continue;
      }
      const uint8_t *part = in + (i / 32 * 2 + half) * (1 + parts) * v;
      size_t quad = i % 32 / 4, field = quad / 2;
      for (size_t k = 0; k < 2; k++) {
        size_t at = 4 * lane + quad % 2 * 2 + k;
        if ((part[at] >> 2 * field & 3) == i % 4)
          *out = m->bits == 8 ? part[(1 + field) * v + at]
                              : part[(1 + field / 2) * v + at] >> field % 2 * 4 & 15;
      }
    }
}

/* Unpack one tile. */
static void unpack_tile(const SqftMatrix *m, size_t tile, Tile t) {
  size_t rows = sqft_tile_rows(m), at[2] = {0, 0};
  const uint8_t *in = sqft_fixed(m, tile), *kept = 0;
  if (m->format == SQFT_MASK) kept = sqft_kept(m, tile);
  for (size_t g = 0; g < m->groups; g++, in += m->group_bytes) {
    for (size_t r = 0; r < rows; r++) {
      uint8_t zero = m->asymmetric ? in[2 * rows + r] : middle(m);
      t.zero[r * m->groups + g] = zero;
      memcpy(t.scale + r * m->groups + g, in + 2 * r, 2);
      memset(t.codes + r * m->inputs + g * m->group, zero, m->group);
    }
    const uint8_t *body = in + sqft_head_bytes(m);
    if (m->format == SQFT_MASK)
      unpack_mask(m, body, kept, at, g, t);
    else
      unpack_other(m, body, g, t);
  }
}

void sqft_unpack(const SqftMatrix *m, uint8_t *codes, uint8_t *zero, uint16_t *scale) {
  Tile t = new_tile(m);
  size_t rows = sqft_tile_rows(m), stored = m->inputs / m->stored_group;
  for (size_t tile = 0; tile < m->tiles; tile++) {
    unpack_tile(m, tile, t);
    for (size_t r = 0; r < rows && tile * rows + r < m->rows; r++) {
      size_t row = tile * rows + r;
      memcpy(codes + row * m->inputs, t.codes + r * m->inputs, m->inputs);
      for (size_t g = 0; g < stored; g++) {
        size_t from = r * m->groups + g * m->stored_group / m->group;
        zero[row * stored + g] = t.zero[from];
        scale[row * stored + g] = t.scale[from];
      }
    }
  }
  free_tile(t);
}

int sqft_check(const SqftMatrix *m, size_t size) {
  if (size < sizeof(SqftMatrix) || memcmp(m->magic, SQFT_MAGIC, 8)) return -1;
  if (m->version != SQFT_VERSION || m->asymmetric > 1) return -1;
  SqftMatrix expected = *m;
  /* with these bounds no computed size overflows 64 bits */
  if (m->rows > 1u << 28 || m->inputs > 1u << 28 || sqft_plan(&expected, 0)) return -1;
  if (m->group != expected.group || m->span != expected.span || m->groups != expected.groups ||
      m->tiles != expected.tiles || m->group_bytes != expected.group_bytes ||
      m->offsets != expected.offsets || m->narrow != expected.narrow ||
      m->fixed != expected.fixed || m->kept != expected.kept)
    return -1;
  if (m->bytes < expected.bytes || m->bytes > size) return -1;
  if (m->format != SQFT_MASK) return 0;
  const uint64_t *offset = (const uint64_t *)((const uint8_t *)m + m->offsets);
  if (offset[0] || offset[m->tiles] != m->bytes - expected.bytes) return -1;
  for (size_t tile = 0; tile < m->tiles; tile++) {
    size_t count[2] = {0, 0};
    for (size_t g = 0; g < m->groups; g++) {
      const uint8_t *mask = sqft_fixed(m, tile) + g * m->group_bytes + sqft_head_bytes(m);
      for (size_t v = 0; v < m->span / 2; v++)
        count[v % 2] += ones(mask + v * (m->lanes / 2), m->lanes / 2);
    }
    size_t wanted = m->bits == 8          ? count[0] + count[1]
                    : count[0] > count[1] ? count[0]
                                          : count[1];
    if (offset[tile + 1] < offset[tile] || offset[tile + 1] - offset[tile] != wanted) return -1;
  }
  return 0;
}

static float half_to_float(uint16_t half) {
  uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? ldexpf((float)fraction, -24)
                                : ldexpf((float)(1024 + fraction), (int)exponent - 25);
  return half >> 15 ? -value : value;
}

/* Dequantize a row of the dense format, where the bytes of a row have fixed places. */
static void dense_row(const SqftMatrix *m, size_t row, float *out) {
  size_t rows = sqft_tile_rows(m), r = row % rows, half = r / m->lanes, lane = r % m->lanes;
  size_t from = m->bits == 4 ? 4 * lane : half * vector_bytes(m) + 4 * lane;
  const uint8_t *in = sqft_fixed(m, row / rows);
  for (size_t g = 0; g < m->groups; g++, in += m->group_bytes, out += m->group) {
    uint16_t stored;
    memcpy(&stored, in + 2 * r, 2);
    const float scale = half_to_float(stored);
    const int zero = m->asymmetric ? in[2 * rows + r] : middle(m);
    const uint8_t *body = in + sqft_head_bytes(m) + from;
    for (size_t i = 0; i < m->group; i++) {
      uint8_t code = body[i / 4 * step_bytes(m) + i % 4];
      if (m->bits == 4) code = code >> 4 * half & 15;
      out[i] = scale * (float)(code - zero);
    }
  }
}

void sqft_row(const SqftMatrix *m, size_t row, float *out) {
  if (m->format == SQFT_DENSE) {
    dense_row(m, row, out);
    return;
  }
  Tile t = new_tile(m);
  size_t r = row % sqft_tile_rows(m);
  unpack_tile(m, row / sqft_tile_rows(m), t);
  for (size_t i = 0; i < m->inputs; i++) {
    size_t at = r * m->groups + i / m->group;
    out[i] = half_to_float(t.scale[at]) * (float)(t.codes[r * m->inputs + i] - t.zero[at]);
  }
  free_tile(t);
}

void sqft_exact(const SqftMatrix *m, const float *x, size_t tokens, float *y, size_t first,
                size_t last) {
  Tile t = new_tile(m);
  size_t rows = sqft_tile_rows(m), inputs = m->inputs;
  float *weight = malloc(inputs * sizeof(float));
  for (size_t tile = first; tile < last; tile++) {
    unpack_tile(m, tile, t);
    for (size_t r = 0; r < rows && tile * rows + r < m->rows; r++) {
      for (size_t g = 0; g < m->groups; g++) {
        float scale = half_to_float(t.scale[r * m->groups + g]);
        int zero = t.zero[r * m->groups + g];
        for (size_t i = g * m->group; i < (g + 1) * m->group; i++)
          weight[i] = scale * (float)(t.codes[r * inputs + i] - zero);
      }
      for (size_t token = 0; token < tokens; token++) {
        const float *in = x + token * inputs;
        float sums[16] = {0}, total = 0;
        size_t i = 0;
        for (; i + 16 <= inputs; i += 16)
          for (size_t j = 0; j < 16; j++) sums[j] += weight[i + j] * in[i + j];
        for (; i < inputs; i++) total += weight[i] * in[i];
        for (size_t j = 0; j < 16; j++) total += sums[j];
        y[token * m->rows + tile * rows + r] = total;
      }
    }
  }
  free(weight);
  free_tile(t);
}

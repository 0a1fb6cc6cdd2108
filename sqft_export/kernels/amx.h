/* Multiply several tokens with AMX, for products.h. One vector of an expanded tile (4 inputs of 16
   rows) is one row of a matrix register, and so are 64 activations of a token. 32 tokens x 32 rows
   are multiplied at once: registers 0 and 1 hold the sums of the first 16 tokens, 2 and 3 those of
   the other 16, 4 and 5 their activations, 6 and 7 weights. Sums are exact and are scaled as in
   wide_tokens, so the results are equal bit for bit. */
enum { HALF = 16, BLOCK = 32 };

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} Registers;

INLINE Registers registers_for(int inputs, int tokens) {
  Registers r = {.palette = 1};
  const int first = tokens < HALF ? tokens : HALF, rest = tokens - first;
  for (int i = 0; i < 6; i++) {
    const int rows = i == 2 || i == 3 || i == 5 ? rest : first;
    r.rows[i] = (uint8_t)rows;
    r.bytes[i] = (uint16_t)(!rows ? 0 : i < 4 ? 4 * LANES : inputs);
  }
  r.rows[6] = r.rows[7] = (uint8_t)(inputs / 4);
  r.bytes[6] = r.bytes[7] = BYTES;
  return r;
}

/* Compute the sums of one group. */
INLINE void block_group(const uint8_t *wide, const int8_t *q, size_t stride, int span, int inputs,
                        int both, int32_t sums[BLOCK][2 * LANES]) {
  const size_t row = sizeof *sums;
  _tile_zero(0);
  _tile_zero(1);
  if (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < span; i += inputs, wide += (size_t)inputs / 2 * BYTES) {
    _tile_loadd(6, wide, 2 * BYTES);
    _tile_loadd(7, wide + BYTES, 2 * BYTES);
    _tile_loadd(4, q + i, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (!both) continue;
    _tile_loadd(5, q + i + HALF * stride, stride);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums[0], row);
  _tile_stored(1, sums[0] + LANES, row);
  if (!both) return;
  _tile_stored(2, sums[HALF], row);
  _tile_stored(3, sums[HALF] + LANES, row);
}

/* Multiply blocks of `some` tokens, from token `first` on, with a complete expanded tile. */
INLINE void block_of(const SqftMatrix *m, const SqftInputs *x, size_t first, size_t tokens,
                     float *y, size_t tile, const uint8_t *wide, size_t wide_stride,
                     const int bits, int inputs, int some) {
  const uint8_t *p = sqft_fixed(m, tile);
  int32_t sums[BLOCK][2 * LANES] __attribute__((aligned(64)));
  F f[BLOCK][2];
  for (int t = 0; t < some; t++) f[t][0] = f[t][1] = f_zero();
  for (uint32_t g = 0; g < m->groups; g++, p += m->group_bytes, wide += wide_stride) {
    Group group = head_of(p, (int)m->asymmetric, bits);
    block_group(wide, place_of(m, x, g, first, tokens), m->span, (int)m->span, inputs, some > HALF,
                sums);
    for (int t = 0; t < some; t++) {
      const size_t at = g * tokens + first + (size_t)t;
      F a = f_set(x->scale[at]);
      for (int v = 0; v < 2; v++) {
        I taken = i_sub(v_load(sums[t] + v * LANES), zeros_of(m, &group, v, x->sum[at], bits));
        f[t][v] = f_fma(f_of(taken), f_mul(group.scale[v], a), f[t][v]);
      }
    }
  }
  y += first * m->rows;
  for (int t = 0; t < some; t++) store_rows(m, tile, y + (size_t)t * m->rows, f[t][0], f[t][1]);
}

/* Compilers assume that these instructions read and write 8 bytes or none. This barrier tells them
   otherwise. */
INLINE void written(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

/* Multiply an expanded tile with all tokens. The register configuration is restored at the end: it
   belongs to the thread, and the runtime's own kernels use it too. */
INLINE void all_tokens(const SqftMatrix *m, const SqftInputs *x, size_t tokens, float *y,
                       size_t tile, const uint8_t *wide, size_t wide_stride, const int bits) {
  Registers before, ours;
  int inputs = 64, shaped = 0;
  while (m->span % (uint32_t)inputs) inputs -= 16;
  _tile_storeconfig(&before);
  written(&before);
  for (size_t t = 0; t < tokens; t += BLOCK) {
    const int some = tokens - t < BLOCK ? (int)(tokens - t) : BLOCK;
    if (some != shaped) {
      ours = registers_for(inputs, some);
      written(&ours);
      _tile_loadconfig(&ours);
      shaped = some;
    }
    block_of(m, x, t, tokens, y, tile, wide, wide_stride, bits, inputs, some);
  }
  if (before.palette)
    _tile_loadconfig(&before);
  else
    _tile_release();
}

INLINE void many_of(const SqftMatrix *m, const SqftInputs *x, size_t tokens, float *y,
                    size_t first, size_t last, uint8_t *scratch, const int format,
                    const int bits) {
  const int wide_already = format == SQFT_DENSE && bits == 8;
  const size_t wide_stride = wide_already ? m->group_bytes : (size_t)m->span / 4 * 2 * BYTES;
  uint8_t *wide = aligned(scratch);
  for (size_t tile = first; tile < last; tile++) {
    const uint8_t *p = sqft_fixed(m, tile), *from = wide;
    Stream kept = stream_of(m, tile, format);
    if (wide_already) from = p + sqft_head_bytes(m);
    for (size_t g = 0; g < m->groups && !wide_already; g++, p += m->group_bytes) {
      Group group = head_of(p, (int)m->asymmetric, bits);
      widened(m, p, &kept, &group, wide + g * wide_stride, format, bits);
    }
    all_tokens(m, x, tokens, y, tile, from, wide_stride, bits);
  }
}

static size_t scratch_bytes(const SqftMatrix *m, size_t tokens) {
  (void)tokens;
  return 64 + (size_t)m->groups * m->span * 2 * BYTES / 4;
}

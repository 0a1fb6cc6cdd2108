/* The instructions of AMX that sqft_export/kernels/amx.h uses, in plain C: what each does by Intel's
   documentation, faults included. */
#pragma once
#include "emulated_avx512.h"
#include <stdlib.h>

typedef struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } Shapes;
static __thread Shapes shapes;
static __thread uint8_t tiles[8][16][64];

static inline void fault(int wrong) { if (wrong) abort(); }
static inline void _tile_release(void) {
  memset(&shapes, 0, sizeof shapes);
  memset(tiles, 0, sizeof tiles);
}
static inline void _tile_loadconfig(const void *p) {
  _tile_release();
  memcpy(&shapes, p, 64);
  fault(shapes.palette != 1 || shapes.start);
  for (int i = 0; i < 14; i++) fault(shapes.reserved[i]);
  for (int i = 0; i < 16; i++)
    fault(shapes.rows[i] > 16 || shapes.bytes[i] > 64 || !shapes.rows[i] != !shapes.bytes[i] ||
          (i >= 8 && shapes.rows[i]));
}
static inline void _tile_storeconfig(void *p) { memcpy(p, &shapes, 64); }
static inline void used(int tile) { fault(!shapes.palette || !shapes.rows[tile]); }
static inline void _tile_zero(int tile) {
  used(tile);
  memset(tiles[tile], 0, sizeof *tiles);
}
static inline void _tile_loadd(int tile, const void *p, size_t stride) {
  used(tile);
  memset(tiles[tile], 0, sizeof *tiles);
  for (int r = 0; r < shapes.rows[tile]; r++)
    memcpy(tiles[tile][r], (const uint8_t *)p + (size_t)r * stride, shapes.bytes[tile]);
}
static inline void _tile_stored(int tile, void *p, size_t stride) {
  used(tile);
  for (int r = 0; r < shapes.rows[tile]; r++)
    memcpy((uint8_t *)p + (size_t)r * stride, tiles[tile][r], shapes.bytes[tile]);
}
/* c += a (signed bytes) times b (unsigned), 4 at a time */
static inline void _tile_dpbsud(int c, int a, int b) {
  used(a), used(b), used(c);
  fault(shapes.rows[a] != shapes.rows[c] || shapes.bytes[b] != shapes.bytes[c] ||
        shapes.bytes[a] != 4 * shapes.rows[b]);
  for (int r = 0; r < shapes.rows[c]; r++)
    for (int k = 0; k < shapes.bytes[a] / 4; k++)
      for (int n = 0; n < shapes.bytes[c] / 4; n++) {
        int32_t sum;
        memcpy(&sum, tiles[c][r] + 4 * n, 4);
        for (int j = 0; j < 4; j++)
          sum += (int8_t)tiles[a][r][4 * k + j] * (int)tiles[b][k][4 * n + j];
        memcpy(tiles[c][r] + 4 * n, &sum, 4);
      }
}

// Products of small matrices in scratch, for attention: queries with keys, softmax numerators with values. They hold
// float32, or pairs of bfloat16 along the depth, one in a word of float32's size.
#ifndef DSPARK_PRODUCT_H
#define DSPARK_PRODUCT_H

#include "common.h"

enum {
  WIDE = 4,                         // vectors of a register tile of few rows: enough sums to keep FMA busy
  WIDE_ROWS = LANES == 16 ? 4 : 2,  // rows of such a tile
  AHEAD_ROWS = 64,
};

// Rows of values of the next tile, of which a line is fetched with each step of a product: keys and values are too
// scattered for the hardware to foresee, and a core can only wait for so many lines at a time.
typedef struct {
  const char *base;
  const long *offsets;  // [AHEAD_ROWS] bytes from base to a row
  long column_bytes;    // bytes further along the row for each column of the product
} Ahead;

// GCC would load a vector anew for each row it is multiplied with, and loads of 64 bytes are as dear as products.
#if defined(__AVX512F__)
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define IN_REGISTER(vector)
#endif

ALWAYS_INLINE floats add_product(floats sum, const float *x, floats w, int pairs) {
#if DOT
  if (pairs) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return add_pairs(sum, pair, (words)w);
  }
#endif
  return sum + *x * w;
}

// out [rows, width * LANES] (+)= x [rows, depth] * w [depth, width * LANES], which begins at `column` of its matrix.
ALWAYS_INLINE void multiply(int rows, int width, int pairs, const float *x, long x_stride, const float *w, long w_stride,
                            long depth, float *out, long out_stride, int accumulate, long column, Ahead ahead) {
  floats sum[TILE_ROWS][WIDE];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < width; j++) sum[i][j] = accumulate ? load(out + i * out_stride + j * LANES) : (floats){0};
  for (long k = 0; k < depth; k++) {
    floats row[WIDE];
#pragma GCC unroll 4
    for (int j = 0; j < width; j++) {
      row[j] = load(w + k * w_stride + j * LANES);
      IN_REGISTER(row[j]);
    }
    for (int each = 0; each <= pairs; each++)
      FETCH(ahead.base + ahead.offsets[((k << pairs) + each) % AHEAD_ROWS] +
            ahead.column_bytes * (column + width * LANES - 1));
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
      for (int j = 0; j < width; j++) sum[i][j] = add_product(sum[i][j], x + i * x_stride + k, row[j], pairs);
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < width; j++) store(out + i * out_stride + j * LANES, sum[i][j]);
}

// out [rows, columns] (+)= x [rows, depth] * w [depth, columns]; columns is a multiple of 32.
ALWAYS_INLINE void multiply_tiles(int pairs, long rows, long columns, const float *x, long x_stride, const float *w,
                                  long w_stride, long depth, float *out, long out_stride, int accumulate,
                                  Ahead ahead) {
#define TILE(height, width)                                                                                    \
  case height:                                                                                                 \
    multiply(height, width, pairs, x, x_stride, w + column, w_stride, depth, out + column, out_stride, accumulate,    \
             column, ahead);                                                                                   \
    break;
  long count = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (long t = 0; t < count; t++) {
    long height = rows * (t + 1) / count - rows * t / count, column = 0;
    if (height <= WIDE_ROWS) {
      for (; column + WIDE * LANES <= columns; column += WIDE * LANES) {
        switch (height) {
          TILE(1, WIDE) TILE(2, WIDE)
#if LANES == 16
          TILE(3, WIDE) TILE(4, WIDE)
#endif
        }
      }
    }
    for (; column < columns; column += 2 * LANES) {
      switch (height) {
        TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2) TILE(5, 2) TILE(6, 2)
#if TILE_ROWS >= 9
        TILE(7, 2) TILE(8, 2) TILE(9, 2)
#endif
#if TILE_ROWS >= 12
        TILE(10, 2) TILE(11, 2) TILE(12, 2)
#endif
      }
    }
    x += height * x_stride;
    out += height * out_stride;
  }
#undef TILE
}

#endif

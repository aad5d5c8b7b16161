// A tile of keys and values, from rows of the cache to the layout in which attention multiplies them.
#ifndef DSPARK_TILE_H
#define DSPARK_TILE_H

#include "product.h"

enum { KEYS = AHEAD_ROWS };  // keys of a tile

#ifdef __AVX512F__
#define TRANSPOSES 1
// [LANES][LANES] words in place: words, then pairs of them within quarters of a register, then quarters.
ALWAYS_INLINE void transpose(words *rows) {
  __m512i *a = (__m512i *)rows, b[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // quarter q of a[4 g + i] is column 4 q + i of rows 4 g to 4 g + 3
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88);
    a[4 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88);
    a[8 + i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd);
    a[12 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd);
  }
}
#elif defined(__AVX2__)
#define TRANSPOSES 1
// [LANES][LANES] words in place: words, then pairs of them within halves of a register, then halves.
ALWAYS_INLINE void transpose(words *rows) {
  __m256i *a = (__m256i *)rows, b[LANES];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x20);
    b[4 + i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) a[i] = b[i];
}
#endif

#ifdef TRANSPOSES
// 2 * LANES consecutive bfloat16 of each of LANES rows at base + offsets -> column [2 * LANES][KEYS] float32, or
// [LANES][KEYS] pairs; base + next is fetched.
ALWAYS_INLINE void transpose_bfloat16(const char *base, const long *offsets, const long *next, int pairs,
                                      float *column) {
  words rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) {
    rows[i] = load_words(base + offsets[i]);
    FETCH(base + next[i]);
  }
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) {
    if (pairs) {
      store(column + i * KEYS, (floats)rows[i]);
      continue;
    }
    store(column + 2 * i * KEYS, (floats)(rows[i] << 16));
    store(column + (2 * i + 1) * KEYS, (floats)(rows[i] & 0xffff0000u));
  }
}
#endif

// Keys at base + offsets [count] -> key [head_dim, KEYS] float32, or [head_dim / 2, KEYS] pairs, while those at base +
// next are fetched. What columns past `count` hold does not matter: they are masked.
ALWAYS_INLINE void pack_keys(const char *base, const long *offsets, const long *next, long count, long head_dim,
                             int dtype, int pairs, float *key) {
#ifdef TRANSPOSES
  if (dtype == BFLOAT16 && head_dim % (2 * LANES) == 0) {
    for (long first = 0; first < count; first += LANES) {
      for (long j = 0; j < head_dim; j += 2 * LANES)
        transpose_bfloat16(base + 2 * j, offsets + first, next + first, pairs, key + (j >> pairs) * KEYS + first);
    }
    return;
  }
#endif
  for (long i = 0; i < count; i++) {
    float row[8];
    long j = 0;
    for (; j + 8 <= head_dim; j += 8) {
      read_floats(row, base + offsets[i] + j * element_size(dtype), dtype, 8);
      for (long c = 0; c < 8; c++) key[(j + c) * KEYS + i] = row[c];
    }
    for (; j < head_dim; j++) read_floats(key + j * KEYS + i, base + offsets[i] + j * element_size(dtype), dtype, 1);
  }
}

// Values at base + offsets [count] -> value [(count + 1) / 2, head_dim] pairs of two keys' values. Of every 32 columns
// the words come in the order in which unpacking leaves them: `in_order` undoes that for sums.
static void pair_values(const char *base, const long *offsets, long count, long head_dim, float *value) {
#if DOT
  for (long j = 0; j < head_dim; j += 2 * LANES) {
#pragma GCC unroll 4
    for (long i = 0; i < count; i += 2) {
      __m512i a = (__m512i)load_words(base + offsets[i] + 2 * j);
      __m512i b = i + 1 < count ? (__m512i)load_words(base + offsets[i + 1] + 2 * j) : _mm512_setzero_si512();
      store(value + i / 2 * head_dim + j, (floats)_mm512_unpacklo_epi16(a, b));
      store(value + i / 2 * head_dim + j + LANES, (floats)_mm512_unpackhi_epi16(a, b));
    }
  }
#endif
}

static void in_order(float *sum, long head_dim) {
#if DOT
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (long j = 0; j < head_dim; j += 2 * LANES) {
    __m512 a = (__m512)load(sum + j), b = (__m512)load(sum + j + LANES);
    store(sum + j, (floats)_mm512_permutex2var_ps(a, low, b));
    store(sum + j + LANES, (floats)_mm512_permutex2var_ps(a, high, b));
  }
#endif
}

// Numerators [columns] float32 -> [columns / 2] pairs of bfloat16, in place.
static void pair_numerators(float *score, long columns) {
#if DOT
  for (long j = 0; j < columns; j += 2 * LANES) {
    __m512 a = (__m512)load(score + j), b = (__m512)load(score + j + LANES);
    store(score + j / 2, (floats)_mm512_cvtne2ps_pbh(b, a));
  }
#endif
}

// Which of a tile's values [count] are not finite, of those outside [from, to), which some query does not see: a
// numerator of 0 times them would be NaN. Their rows of `value` become zeros. 0: there are none, as ever but after an
// overflow.
static int clear_broken(const char *base, const long *offsets, long count, long from, long to, long head_dim, long dim,
                        int dtype, int pairs, float *value, uint8_t *broken) {
  int any = 0;
  for (long i = 0; i < count; i++) {
    broken[i] = (i < from || i >= to) && any_broken(base + offsets[i], dtype, head_dim);
    any |= broken[i];
    if (!broken[i]) continue;
    uint32_t kept = !pairs ? 0 : i % 2 ? 0xffff : 0xffff0000u;  // the other key's half of a word
    uint32_t *row = (uint32_t *)(value + (i >> pairs) * dim);
    for (long j = 0; j < dim; j++) row[j] &= kept;
  }
  return any;
}

#endif

// What every kernel shares: vectors, element conversion, threads, scratch memory.
//
// Kernels are written with the vector extension of GCC and Clang, so that one source serves every instruction set:
// LANES floats are one AVX-512 register, or one AVX register, or a few smaller ones elsewhere.
#ifndef DSPARK_COMMON_H
#define DSPARK_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

// Rows of a register tile of two vectors: accumulators take 24 of 32 registers, or 12 of 16. Clang spills beyond 18.
#if LANES == 16 && !defined(__clang__)
#define TILE_ROWS 12
#elif LANES == 16
#define TILE_ROWS 9
#else
#define TILE_ROWS 6
#endif

// Whether bfloat16 is multiplied in pairs (VDPBF16PS), where that is the faster way: build.py says so.
#if defined(DSPARK_BFLOAT16_DOT) && defined(__AVX512BF16__)
#define DOT 1
#else
#define DOT 0
#endif

#define EXPORT __attribute__((visibility("default")))
#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));

// Element types of activations and caches, as Python passes them.
enum { FLOAT32 = 0, BFLOAT16 = 1 };

ALWAYS_INLINE long element_size(int dtype) { return dtype == BFLOAT16 ? 2 : 4; }
ALWAYS_INLINE long round_up(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }
ALWAYS_INLINE long smaller(long a, long b) { return a < b ? a : b; }
ALWAYS_INLINE long larger(long a, long b) { return a > b ? a : b; }

ALWAYS_INLINE floats load(const float *p) {
  floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

ALWAYS_INLINE words load_words(const void *p) {
  words v;
  memcpy(&v, p, sizeof v);
  return v;
}

ALWAYS_INLINE void store(float *p, floats v) { memcpy(p, &v, sizeof v); }

#if DOT
// sum + a pair of bfloat16, the same in every lane, times a pair of each lane.
ALWAYS_INLINE floats add_pairs(floats sum, int32_t pair, words pairs) {
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)pairs);
}
#endif

ALWAYS_INLINE floats splat(float x) { return x - (floats){0}; }

ALWAYS_INLINE floats choose(integers mask, floats yes, floats no) {
  return (floats)(((words)mask & (words)yes) | (~(words)mask & (words)no));
}

ALWAYS_INLINE float sum_lanes(floats v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
#endif
}

// The greatest lane; a NaN may be lost.
ALWAYS_INLINE float max_lanes(floats v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

// 2^x to about 1e-7 relative; 0 below 2^-126, saturates at 2^127, NaN stays NaN.
ALWAYS_INLINE floats exp2_lanes(floats x) {
  const float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  floats bounded = choose(x < splat(127.0f), x, splat(127.0f));
  floats shifted = bounded + round_to_integer;
  floats f = bounded - (shifted - round_to_integer);  // in [-0.5, 0.5]
  floats p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  floats scaled = (floats)((words)p + ((words)shifted << 23));  // add the integer to the exponent
  scaled = choose(x < splat(-126.0f), splat(0.0f), scaled);
  return choose(x == x, scaled, x);
}

ALWAYS_INLINE floats silu_lanes(floats x) { return x / (1.0f + exp2_lanes(x * -1.44269504f)); }

// x / 2 * (1 + tanh(z)) = x / (1 + exp(-2 z)), z = sqrt(2 / pi) * (x + 0.044715 x^3).
ALWAYS_INLINE floats gelu_lanes(floats x) {
  return x / (1.0f + exp2_lanes((x + 0.044715f * x * x * x) * -2.30220818f));
}

// row[0..padded) = exp(row - max); returns the sum, and the maximum through `max`. The padding holds -infinity.
ALWAYS_INLINE float exponentials(float *row, long padded, float *max) {
  const float log2_e = 1.44269504f;
  floats best = load(row);
  for (long j = LANES; j < padded; j += LANES) {
    floats v = load(row + j);
    best = choose(v > best, v, best);
  }
  *max = max_lanes(best);
  floats sum = {0};
  for (long j = 0; j < padded; j += LANES) {
    floats e = exp2_lanes((load(row + j) - *max) * log2_e);
    store(row + j, e);
    sum += e;
  }
  return sum_lanes(sum);
}

ALWAYS_INLINE float from_bfloat16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest even; NaN stays a (quiet) NaN.
ALWAYS_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

// dst[0..count) = src[0..count) as float32.
ALWAYS_INLINE void read_floats(float *restrict dst, const void *restrict src, int dtype, long count) {
  if (dtype == BFLOAT16) {
    const uint16_t *from = src;
    for (long i = 0; i < count; i++) dst[i] = from_bfloat16(from[i]);
  } else {
    memcpy(dst, src, count * sizeof(float));
  }
}

// x[0..count) as if stored in dtype and read again.
ALWAYS_INLINE void round_floats(float *x, int dtype, long count) {
  if (dtype == BFLOAT16)
    for (long i = 0; i < count; i++) x[i] = from_bfloat16(to_bfloat16(x[i]));
}

// dst[0..count) = src[0..count) rounded to dtype. The processor's own conversion makes subnormal numbers zero.
ALWAYS_INLINE void write_floats(void *restrict dst, const float *restrict src, int dtype, long count) {
  if (dtype == BFLOAT16) {
    uint16_t *to = dst;
    long i = 0;
#ifdef __AVX512BF16__
    for (; i + LANES <= count; i += LANES) {
      __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(src + i));
      memcpy(to + i, &rounded, sizeof rounded);
    }
    for (; i < count; i++) {
      __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(src[i]));
      memcpy(to + i, &rounded, sizeof *to);
    }
#else
    for (; i < count; i++) to[i] = to_bfloat16(src[i]);
#endif
  } else {
    memcpy(dst, src, count * sizeof(float));
  }
}

// Whether any of row[0..count) is NaN or infinite: all bits of its exponent are set.
ALWAYS_INLINE int any_broken(const void *row, int dtype, long count) {
  int broken = 0;
  if (dtype == BFLOAT16) {
    const uint16_t *bits = row;
    for (long i = 0; i < count; i++) broken |= (bits[i] & 0x7f80) == 0x7f80;
  } else {
    const uint32_t *bits = row;
    for (long i = 0; i < count; i++) broken |= (bits[i] & 0x7f800000u) == 0x7f800000u;
  }
  return broken;
}

ALWAYS_INLINE const void *element(const void *base, int dtype, long index) {
  return (const char *)base + index * element_size(dtype);
}

ALWAYS_INLINE void *mutable_element(void *base, int dtype, long index) {
  return (char *)base + index * element_size(dtype);
}

// Fetch a line into L2. The first level can only wait for a dozen or two at a time: asked for as many as memory takes to
// answer, it holds up the loads that would have hit.
#define FETCH(address) __builtin_prefetch(address, 0, 2)

// Run body(context) on the caller and up to `threads` - 1 others at once, and return when all that began have ended.
// Bodies share work out through a Tasks counter, so that a thread that is late or missing leaves more for the others.
void run_parallel(void (*body)(void *context), void *context, int threads);

typedef struct {
  long next;   // first task that nobody has taken
  long count;  // tasks in all
  long grain;  // how many a thread takes at a time
} Tasks;

// The next range of tasks for the calling thread: 1 and [*first, *last), or 0 when all are taken.
ALWAYS_INLINE int take_tasks(Tasks *tasks, long *first, long *last) {
  *first = __atomic_fetch_add(&tasks->next, tasks->grain, __ATOMIC_RELAXED);
  *last = smaller(*first + tasks->grain, tasks->count);
  return *first < tasks->count;
}

// The next single task, or -1.
ALWAYS_INLINE long take_task(Tasks *tasks) {
  long first, last;
  return take_tasks(tasks, &first, &last) ? first : -1;
}

// The task after the current one, where a thread had better know it; -1 when there are no more left than threads, of
// which whoever is free should take them.
ALWAYS_INLINE long take_early(Tasks *tasks, int threads) {
  return tasks->count - __atomic_load_n(&tasks->next, __ATOMIC_RELAXED) > threads ? take_task(tasks) : -1;
}

// Rows in as many pieces as keep the threads level, one piece if there is little to do in all.
ALWAYS_INLINE Tasks tasks_of_rows(long rows, long elements_per_row, int *threads) {
  const long worth_a_thread = 16384;  // elements; waking the pool costs a few microseconds
  *threads = (int)larger(1, smaller(*threads, rows * elements_per_row / worth_a_thread));
  return (Tasks){0, rows, larger(1, rows / (4 * *threads))};
}

// The calling thread's scratch of at least `count` floats, 64-byte aligned, valid until its next call.
float *thread_scratch(long count);

#endif

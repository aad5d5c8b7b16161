// y = x W^T + bias with bfloat16 x and W, accumulated in float32.
//
// W is packed once as [Nout / 32][K / 2][32][2]: 32 output features side by side, two consecutive k of a feature in one
// 32-bit word. That is what VDPBF16PS multiplies, where it is the faster way (AMD since Zen 4: build.py says so).
// Elsewhere a shift (even k) or a mask (odd k) turns a word into the float32 it stands for, and float32 FMA does the
// rest: on Intel's cores it does twice the multiplications of VDPBF16PS. Every row's products are added in order of k
// whatever the tile, so a row's result does not depend on its neighbours.
#include "common.h"

enum {
  BLOCK = 32,         // output features of a packed block
  PANEL = 2 * LANES,  // output features of a register tile
  LINE = 32,          // bfloat16 in a cache line
  AHEAD = 96,         // cache lines of the weight fetched ahead of its use
};

// How rows of x are kept while they are multiplied.
#if DOT
typedef uint16_t input;
#else
typedef float input;
#endif

// out [rows, PANEL] = x [rows, 2 * pairs] times one panel of a packed block, while what this thread multiplies after
// it, from `then` on, and `ahead` [pairs, LINE] are fetched.
ALWAYS_INLINE void multiply(int rows, const input *x, long x_stride, const uint16_t *weight, long pairs,
                            const uint16_t *then, const uint16_t *ahead, float *out) {
  floats sum[TILE_ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (floats){0};
  const uint16_t *coming = weight + AHEAD * LINE;
  for (long k = 0; k < pairs; k++) {
    words first = load_words(weight), second = load_words(weight + 2 * LANES);
    if (k == pairs - AHEAD / 2) coming = then;
    FETCH(coming);
    FETCH(coming + LINE);
    FETCH(ahead + k * LINE);
    coming += 2 * LINE;
    weight += 2 * BLOCK;
#if DOT
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      int32_t pair;
      memcpy(&pair, x + i * x_stride + 2 * k, sizeof pair);
      sum[i][0] = add_pairs(sum[i][0], pair, first);
      sum[i][1] = add_pairs(sum[i][1], pair, second);
    }
#else
    floats even[2] = {(floats)(first << 16), (floats)(second << 16)};
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      float value = x[i * x_stride + 2 * k];
      sum[i][0] += value * even[0];
      sum[i][1] += value * even[1];
    }
    floats odd[2] = {(floats)(first & 0xffff0000u), (floats)(second & 0xffff0000u)};
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      float value = x[i * x_stride + 2 * k + 1];
      sum[i][0] += value * odd[0];
      sum[i][1] += value * odd[1];
    }
#endif
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    store(out + i * BLOCK, sum[i][0]);
    store(out + i * BLOCK + LANES, sum[i][1]);
  }
}

// multiply() for each number of rows, as a function of its own: the rows' sums live in registers.
#define TILE(rows)                                                                                           \
  static void multiply_##rows(const input *x, long x_stride, const uint16_t *weight, long pairs,             \
                              const uint16_t *then, const uint16_t *ahead, float *out) {                     \
    multiply(rows, x, x_stride, weight, pairs, then, ahead, out);                                            \
  }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if TILE_ROWS >= 9
TILE(7) TILE(8) TILE(9)
#endif
#if TILE_ROWS >= 12
TILE(10) TILE(11) TILE(12)
#endif

typedef void (*tile)(const input *x, long x_stride, const uint16_t *weight, long pairs, const uint16_t *then,
                     const uint16_t *ahead, float *out);
static const tile tiles[TILE_ROWS + 1] = {
    0,          multiply_1,  multiply_2,  multiply_3, multiply_4, multiply_5, multiply_6,
#if TILE_ROWS >= 9
    multiply_7, multiply_8,  multiply_9,
#endif
#if TILE_ROWS >= 12
    multiply_10, multiply_11, multiply_12,
#endif
};

// Rows that are multiplied by the same matrix: of `rows` rows, from `start` on, matrix number `expert`.
typedef struct {
  long expert, start, rows;
} Part;

typedef struct {
  Tasks tasks;  // of packed blocks
  const uint16_t *x, *weight;
  const float *bias;  // [Nout rounded up to BLOCK], or null
  void *out;
  long rows, x_stride, in_features;
  long out_features;  // columns of `out`
  int out_dtype, threads;
  int gated;  // W has as many rows again: out = silu(x times the first of them) * (x times the others)
  const Part *parts;       // null: all rows are multiplied by one W; else weight holds one W after another
  const int32_t *sources;  // null: row i is row i of x; else the row of x that it is
  float limit;             // gates are cut at it, what they multiply at +-it; 0: not so
} Linear;

// Rows of x that a thread goes through at a time, copied or converted unless they can be read where they lie: they stay
// in the L2 cache (1 MB in float32) beside a block of W.
static long rows_of_chunk(long padded) { return larger(4 * TILE_ROWS, (1 << 18) / padded / TILE_ROWS * TILE_ROWS); }

// result [height, BLOCK] = x [height, K] times one packed block, plus bias. A thread comes to block `then` next. Tile `t`
// of `count` that the rows are cut into: a single one waits for memory whatever it does, of several the first two fetch
// a half each of block `later`.
static void multiply_tile(const Linear *linear, const input *x, int height, long block, long then, long later, long t,
                          long count, float *result) {
  long pairs = (linear->in_features + 1) / 2, size = BLOCK * 2 * pairs;
  const uint16_t *weight = linear->weight + block * size;
  const uint16_t *ahead = count == 1 ? weight : linear->weight + later * size + t % 2 * (size / 2);
  for (int panel = 0; panel < BLOCK; panel += PANEL)
    tiles[height](x, 2 * pairs, weight + 2 * panel, pairs, linear->weight + then * size, ahead, result + panel);
  if (!linear->bias) return;
  for (int i = 0; i < height; i++)
    for (int j = 0; j < BLOCK; j++) result[i * BLOCK + j] += linear->bias[block * BLOCK + j];
}

ALWAYS_INLINE floats at_most(floats x, float limit) { return choose(x > splat(limit), splat(limit), x); }

// gate [height, BLOCK] = silu(gate) * up, of numbers rounded to bfloat16 as if each had been a product of its own.
static void gate_tile(int height, float *gate, float *up, float limit) {
  uint16_t rounded[BLOCK];
  for (int i = 0; i < height; i++, gate += BLOCK, up += BLOCK) {
    write_floats(rounded, gate, BFLOAT16, BLOCK);
    read_floats(gate, rounded, BFLOAT16, BLOCK);
    write_floats(rounded, up, BFLOAT16, BLOCK);
    read_floats(up, rounded, BFLOAT16, BLOCK);
    for (int j = 0; limit && j < BLOCK; j += LANES) {
      store(gate + j, at_most(load(gate + j), limit));
      store(up + j, -at_most(-at_most(load(up + j), limit), limit));
    }
    for (int j = 0; j < BLOCK; j += LANES) store(gate + j, silu_lanes(load(gate + j)) * load(up + j));
  }
}

// Rows [0, rows) of x against one packed block, or two where one gates the other; `out`: the block's first column. This
// thread comes to block `later` next; `block` itself, if that is not known.
static void multiply_block(const Linear *linear, const input *x, long rows, long block, long later, void *out) {
  long padded = round_up(linear->in_features, 2), columns = smaller(BLOCK, linear->out_features - block * BLOCK);
  float result[TILE_ROWS * BLOCK] __attribute__((aligned(64))), up[TILE_ROWS * BLOCK] __attribute__((aligned(64)));
  long count = (rows + TILE_ROWS - 1) / TILE_ROWS, gap = linear->out_features / BLOCK;
  for (long t = 0, first = 0; t < count; t++) {
    long last = rows * (t + 1) / count, height = last - first;
    const input *tile_rows = x + first * padded;
    long then = t + 1 < count ? block : later;
    if (linear->gated) {
      multiply_tile(linear, tile_rows, height, block, block + gap, later, t, count, result);
      multiply_tile(linear, tile_rows, height, block + gap, then, later + gap, t, count, up);
      gate_tile(height, result, up, linear->limit);
    } else {
      multiply_tile(linear, tile_rows, height, block, then, later, t, count, result);
    }
    for (long i = 0; i < height; i++)
      write_floats(mutable_element(out, linear->out_dtype, (first + i) * linear->out_features), result + i * BLOCK,
                   linear->out_dtype, columns);
    first = last;
  }
}

static Part part_of(const Linear *linear, long number, long chunk) {
  if (linear->parts) return linear->parts[number];
  return (Part){0, number * chunk, smaller(chunk, linear->rows - number * chunk)};
}

static void multiply_blocks(void *context) {
  Linear *linear = context;
  long padded = round_up(linear->in_features, 2), chunk = rows_of_chunk(padded);
  int as_it_is = DOT && linear->in_features == padded && linear->x_stride == padded && !linear->sources;
  input *scratch = as_it_is ? 0 : (input *)thread_scratch(smaller(chunk, linear->rows) * padded);
  long converted = -1, task, upcoming;
  long blocks = (linear->out_features + BLOCK - 1) / BLOCK, blocks_of_matrix = linear->gated ? 2 * blocks : blocks;
  for (task = take_task(&linear->tasks); task >= 0; task = upcoming >= 0 ? upcoming : take_task(&linear->tasks)) {
    upcoming = take_early(&linear->tasks, linear->threads);  // its weights are fetched early
    long number = task / blocks;
    Part part = part_of(linear, number, chunk);
    const input *x = as_it_is ? (const input *)linear->x + part.start * padded : scratch;
    if (!as_it_is && number != converted) {
      for (long i = 0; i < part.rows; i++) {
        scratch[(i + 1) * padded - 1] = 0;  // overwritten unless K is odd
        long source = linear->sources ? linear->sources[part.start + i] : part.start + i;
        const uint16_t *from = linear->x + source * linear->x_stride;
#if DOT
        memcpy(scratch + i * padded, from, linear->in_features * sizeof *from);
#else
        read_floats(scratch + i * padded, from, BFLOAT16, linear->in_features);
#endif
      }
      converted = number;
    }
    long corner = part.start * linear->out_features + task % blocks * BLOCK;
    long block = task % blocks, later = block;
    if (upcoming >= 0) later = upcoming % blocks;
    Linear own = *linear;
    if (linear->parts) {  // a block of another matrix has a number counted from this one's first
      own.weight += part.expert * blocks_of_matrix * BLOCK * padded;
      if (upcoming >= 0) later += (linear->parts[upcoming / blocks].expert - part.expert) * blocks_of_matrix;
    }
    multiply_block(&own, x, part.rows, block, later, mutable_element(linear->out, linear->out_dtype, corner));
  }
}

static void run_linear(Linear linear) {
  long blocks = (linear.out_features + BLOCK - 1) / BLOCK, chunk = rows_of_chunk(round_up(linear.in_features, 2));
  linear.tasks = (Tasks){0, blocks * ((linear.rows + chunk - 1) / chunk), 1};
  run_parallel(multiply_blocks, &linear, linear.threads);
}

// x [rows, K] bfloat16, weight packed, bias float32 -> out [rows, Nout] float32 or bfloat16.
EXPORT void dspark_linear(const uint16_t *x, const uint16_t *weight, const float *bias, void *out, long rows,
                          long x_stride, long in_features, long out_features, int out_dtype, int threads) {
  run_linear((Linear){{0}, x, weight, bias, out, rows, x_stride, in_features, out_features, out_dtype, threads, 0, 0, 0, 0});
}

// The same and `silu_mul` of it: weight [2 * features, K] with the gate first -> out [rows, features] bfloat16, where
// features is a multiple of BLOCK. The halves never leave the caches of the core that made them.
void dspark_gated_linear(const uint16_t *x, const uint16_t *weight, const float *bias, uint16_t *out, long rows,
                         long x_stride, long in_features, long features, int threads) {
  run_linear((Linear){{0}, x, weight, bias, out, rows, x_stride, in_features, features, BFLOAT16, threads, 1, 0, 0, 0});
}

typedef struct {
  Tasks tasks;  // of tokens
  const float *rows, *shares;
  const int32_t *places;
  uint16_t *out;
  long chosen, hidden;
} Combine;

static void combine_tokens(void *context) {
  Combine *combine = context;
  long hidden = combine->hidden, first, last;
  float *sum = thread_scratch(hidden);
  while (take_tasks(&combine->tasks, &first, &last)) {
    for (long token = first; token < last; token++) {
      memset(sum, 0, hidden * sizeof(float));
      for (long slot = token * combine->chosen; slot < (token + 1) * combine->chosen; slot++) {
        if (combine->places[slot] < 0) continue;  // another rank's
        const float *row = combine->rows + combine->places[slot] * hidden;
        for (long j = 0; j < hidden; j++) sum[j] += combine->shares[slot] * row[j];
      }
      write_floats(combine->out + token * hidden, sum, BFLOAT16, hidden);
    }
  }
}

// Each of `chosen` experts of a token, by their shares: out [tokens, hidden] = sum of share * down(silu(gate x) * up x).
// Gates are cut at `limit`, what they multiply at +-limit (0: not so). experts and shares [tokens, chosen]; an expert
// from `count` on is another rank's and adds nothing. gate_up and down hold one packed matrix after another, features is
// a multiple of BLOCK. Rows are sorted by expert, so that each matrix is read once; a row's result depends on no other
// row. activated [tokens * chosen, features], rows [tokens * chosen, hidden] and index [2 * tokens * chosen + count + 1]
// are scratch; count is the number of experts.
EXPORT void dspark_experts(const uint16_t *x, long x_stride, const uint16_t *gate_up, const uint16_t *down,
                           const int32_t *experts, const float *shares, uint16_t *out, long tokens, long chosen,
                           long count, long hidden, long features, float limit, uint16_t *activated, float *rows,
                           int32_t *index, int threads) {
  long slots = tokens * chosen, parts_in = 0, parts_down = 0;
  int32_t *sources = index, *places = sources + slots, *starts = places + slots;
  memset(starts, 0, (count + 1) * sizeof *starts);
  for (long slot = 0; slot < slots; slot++)
    if (experts[slot] < count) starts[experts[slot] + 1]++;
  for (long expert = 0; expert < count; expert++) starts[expert + 1] += starts[expert];
  long wide = rows_of_chunk(round_up(hidden, 2)), narrow = rows_of_chunk(round_up(features, 2));
  Part *parts = malloc(2 * (slots + 1) * sizeof *parts), *later = parts + slots + 1;
  if (!parts) abort();
  for (long expert = 0; expert < count; expert++) {
    for (long at = starts[expert]; at < starts[expert + 1]; at += wide)
      parts[parts_in++] = (Part){expert, at, smaller(wide, starts[expert + 1] - at)};
    for (long at = starts[expert]; at < starts[expert + 1]; at += narrow)
      later[parts_down++] = (Part){expert, at, smaller(narrow, starts[expert + 1] - at)};
  }
  for (long slot = 0; slot < slots; slot++) {  // in order of the slots: the sort is stable
    if (experts[slot] >= count) {
      places[slot] = -1;
      continue;
    }
    long place = starts[experts[slot]]++;
    sources[place] = (int32_t)(slot / chosen);
    places[slot] = (int32_t)place;
  }
  Linear in = {{0, parts_in * (features / BLOCK), 1}, x, gate_up, 0, activated, slots, x_stride, hidden, features,
               BFLOAT16, threads, 1, parts, sources, limit};
  run_parallel(multiply_blocks, &in, threads);
  Linear back = {{0, parts_down * ((hidden + BLOCK - 1) / BLOCK), 1}, activated, down, 0, rows, slots, features,
                 features, hidden, FLOAT32, threads, 0, later, 0, 0};
  run_parallel(multiply_blocks, &back, threads);
  free(parts);
  Combine combine = {tasks_of_rows(tokens, chosen * hidden, &threads), rows, shares, places, out, chosen, hidden};
  run_parallel(combine_tokens, &combine, threads);
}

typedef struct {
  Tasks tasks;
  const uint16_t *weight;
  uint16_t *packed;
  long in_features, out_features;
} Pack;

static void pack_blocks(void *context) {
  Pack *pack = context;
  long padded = round_up(pack->in_features, 2), first, last;
  while (take_tasks(&pack->tasks, &first, &last)) {
    for (long block = first; block < last; block++) {
      uint16_t *to = pack->packed + block * BLOCK * padded;
      memset(to, 0, BLOCK * padded * sizeof *to);
      for (long j = 0; j < smaller(BLOCK, pack->out_features - block * BLOCK); j++) {
        const uint16_t *from = pack->weight + (block * BLOCK + j) * pack->in_features;
        for (long k = 0; k < pack->in_features; k++) to[k / 2 * 2 * BLOCK + 2 * j + k % 2] = from[k];
      }
    }
  }
}

// weight [Nout, K] contiguous -> packed [Nout rounded up to 32, K rounded up to 2].
EXPORT void dspark_pack_linear(const uint16_t *weight, uint16_t *packed, long in_features, long out_features,
                               int threads) {
  Pack pack = {{0, (out_features + BLOCK - 1) / BLOCK, 1}, weight, packed, in_features, out_features};
  run_parallel(pack_blocks, &pack, threads);
}

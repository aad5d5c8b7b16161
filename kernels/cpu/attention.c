// Paged attention over runs of any length: decode steps, draft blocks and prefill chunks are the same thing.
//
// A task is (run, query tile, key/value heads): all heads, since a token's lie side by side in the cache and memory is
// fastest read in order, or one, if there are too few runs for the threads. Its rows are the tile's queries for all the
// query heads that share a head, so keys and values are read once for the group. Keys are visited in tiles of KEYS at
// fixed absolute positions with an online softmax, while those a tile further on, across the end of the task, are
// fetched into L2. Every row adds its products in order of position: a row's result depends neither on the task it is
// in nor on what else is in the step. What a query does not see is masked, not multiplied by 0: a NaN there stays there.
// Context is not split between threads, so a single long run keeps at most Hkv of them busy.
#include "tile.h"

#include <stdlib.h>

enum {
  TASK_ROWS = 96,  // queries * group of a task, unless one query has more
  DEPTH = 32,      // head sizes are padded to a multiple of this in scratch
};

typedef struct {
  Tasks tasks;
  const void *queries;
  long stride;  // elements from one token's row to the next
  const void *keys, *values;
  void *out;
  const int32_t *query_start, *context_len, *block_tables;
  const long *tile_start;  // [runs + 1] query tiles before each run
  long runs, table_width, block_size;
  long block_stride;  // bytes from one block of keys or values to the next
  long q_heads, kv_heads, head_dim, tile_queries, task_heads;
  long window;     // 0: none
  long first_key;  // keys before it are not seen
  float scale, softcap;  // softcap 0: none
  int causal, dtype, threads;
} Attention;

// A task: query tokens [query, query + queries) of a run, for `task_heads` key/value heads from `head` on.
typedef struct {
  long run, query, queries, head;
} Piece;

// Scratch of a task. Where bfloat16 is multiplied in pairs, so are query and key along the head and numerators and
// values along the keys: half as many rows or columns, each a word. Values are then in the order of `pair_values`. Rows
// are (head, query, query head of its group); dim is head_dim padded to DEPTH. Keys, values and scores are of one head.
typedef struct {
  float *query;   // [rows, dim]
  float *score;   // [rows of a head, KEYS], then the softmax's numerators
  float *sum;     // [rows, dim] of numerator * value
  float *key;     // [dim, KEYS]
  float *value;   // [KEYS, dim]
  float *peak;    // [rows] greatest score so far
  float *weight;  // [rows, LANES] sums of numerators, lane by lane
  long *begin, *end;  // [rows] visible key positions
} Scratch;

// Scores of one row against the keys at [position, position + KEYS), times `scale` -> softmax numerators; `sum` [dim]
// is rescaled.
ALWAYS_INLINE void soften_row(const Scratch *scratch, long i, float *score, long position, long columns, long dim,
                              float scale) {
  float *sum = scratch->sum + i * dim;
  long begin = scratch->begin[i] - position, end = scratch->end[i] - position;
  for (long j = 0; j < smaller(begin, columns); j++) score[j] = -INFINITY;
  for (long j = larger(end, 0); j < columns; j++) score[j] = -INFINITY;
  if (begin >= columns || end <= 0) {  // nothing to see in this tile
    memset(score, 0, columns * sizeof *score);
    return;
  }
  floats best = load(score);
  for (long j = LANES; j < columns; j += LANES) {
    floats v = load(score + j);
    best = choose(v > best, v, best);
  }
  float old = scratch->peak[i], tile_peak = max_lanes(best) * scale;
  floats weight = load(scratch->weight + i * LANES);
  if (tile_peak > old) {
    scratch->peak[i] = tile_peak;
    floats shrink = exp2_lanes(splat(old - tile_peak));
    weight *= shrink;
    for (long j = 0; j < dim; j += LANES) store(sum + j, load(sum + j) * shrink);
  }
  floats peak = splat(scratch->peak[i]);
  for (long j = 0; j < columns; j += LANES) {
    floats numerator = exp2_lanes(load(score + j) * scale - peak);
    weight += numerator;
    store(score + j, numerator);
  }
  store(scratch->weight + i * LANES, weight);
}

// Scores times `scale`, capped: cap * tanh(score / cap), tanh(z) = 1 - 2 / (1 + exp(2 z)).
ALWAYS_INLINE void cap_row(float *score, long columns, float scale, float cap) {
  float doubled = 2 * 1.44269504f * scale / cap;
  for (long j = 0; j < columns; j += LANES)
    store(score + j, cap - 2 * cap / (1.0f + exp2_lanes(load(score + j) * doubled)));
}

// A row's numerators of values that are not finite, which it sees: they make NaN of it, as those values would have.
static void break_row(const Scratch *scratch, long i, float *score, long position, long count, const uint8_t *broken) {
  long from = larger(0, scratch->begin[i] - position), to = smaller(count, scratch->end[i] - position);
  for (long j = from; j < to; j++)
    if (broken[j]) score[j] = NAN;
}

// Bytes from the start of the cache to each of `count` of a run's keys from `position` on.
static void locate_keys(const Attention *attention, long run, long head, long position, long count, long *offsets) {
  const int32_t *table = attention->block_tables + run * attention->table_width;
  long row = attention->head_dim * element_size(attention->dtype), token = attention->kv_heads * row;
  long block = position / attention->block_size, within = position % attention->block_size, i = 0;
  while (i < count) {
    long offset = table[block++] * attention->block_stride + within * token + head * row;
    for (; within < attention->block_size && i < count; within++, offset += token) offsets[i++] = offset;
    within = 0;
  }
}

static Piece piece_of(const Attention *attention, long task) {
  long parts = attention->kv_heads / attention->task_heads, tile = task / parts, low = 0, high = attention->runs;
  while (high - low > 1) {  // the run whose tiles include this one
    long middle = (low + high) / 2;
    if (attention->tile_start[middle] <= tile)
      low = middle;
    else
      high = middle;
  }
  long query = (tile - attention->tile_start[low]) * attention->tile_queries;
  long run_queries = attention->query_start[low + 1] - attention->query_start[low];
  return (Piece){low, query, smaller(attention->tile_queries, run_queries - query),
                 task % parts * attention->task_heads};
}

// The keys that some query of a piece sees: [*begin, *end), begin at the start of a tile.
static void visible_keys(const Attention *attention, Piece piece, long *begin, long *end) {
  long first = attention->context_len[piece.run] + piece.query, last = first + piece.queries;
  long run_queries = attention->query_start[piece.run + 1] - attention->query_start[piece.run];
  long oldest = attention->window ? first + 1 - attention->window : 0;
  *begin = larger(attention->first_key, oldest) / KEYS * KEYS;
  *end = attention->causal ? last : attention->context_len[piece.run] + run_queries;
}

// The keys that every query of a piece sees: [*begin, *end).
static void shared_keys(const Attention *attention, Piece piece, long *begin, long *end) {
  long first = attention->context_len[piece.run] + piece.query;
  long run_queries = attention->query_start[piece.run + 1] - attention->query_start[piece.run];
  long oldest = attention->window ? first + piece.queries - attention->window : 0;
  *begin = larger(attention->first_key, oldest);
  *end = attention->causal ? first + 1 : attention->context_len[piece.run] + run_queries;
}

// How far a thread has fetched: keys [position, end) of `task` are next, and then those of the task after it.
typedef struct {
  long task, run, head, position, end;
} Fetched;

static void fetch_task(const Attention *attention, long task, Fetched *fetched) {
  Piece piece = piece_of(attention, task);
  fetched->task = task;
  fetched->run = piece.run;
  fetched->head = piece.head;
  visible_keys(attention, piece, &fetched->position, &fetched->end);
}

// Where the next `count` keys to be fetched lie, those of task `upcoming` (or none: -1) after the current one's. Always
// KEYS offsets: where there are no keys left, one that has been fetched.
static void locate_next(const Attention *attention, Fetched *fetched, long upcoming, long count, long *offsets) {
  long found = 0;
  while (found < count) {
    if (fetched->position == fetched->end) {
      if (upcoming < 0 || fetched->task == upcoming) break;
      fetch_task(attention, upcoming, fetched);
    }
    long some = smaller(count - found, fetched->end - fetched->position);
    locate_keys(attention, fetched->run, fetched->head, fetched->position, some, offsets + found);
    fetched->position += some;
    found += some;
  }
  for (long i = found; i < KEYS; i++) offsets[i] = found ? offsets[0] : 0;
}

// Do `task`, after which this thread does `upcoming` (-1: not known).
ALWAYS_INLINE void attend_piece(const Attention *attention, const Scratch *scratch, long task, long upcoming,
                                Fetched *fetched, int pairs) {
  Piece piece = piece_of(attention, task);
  long run = piece.run, query = piece.query, heads = attention->task_heads;
  long group = attention->q_heads / attention->kv_heads, head_dim = attention->head_dim;
  long dim = round_up(head_dim, DEPTH), rows = piece.queries * group, first_token = attention->query_start[run];
  long context = attention->context_len[run], run_queries = attention->query_start[run + 1] - first_token;
  long total = context + run_queries, begin, end, shared_begin, shared_end;
  long first_column = piece.head * group * head_dim;
  int dtype = attention->dtype;
  for (long i = 0; i < heads * rows; i++) {
    long token = query + i % rows / group, position = context + token;
    float *row = scratch->query + i * dim;
    long column = first_column + (i / rows * group + i % group) * head_dim;
    const void *from = element(attention->queries, dtype, (first_token + token) * attention->stride + column);
    if (pairs)
      memcpy(row, from, head_dim * sizeof(uint16_t));
    else
      read_floats(row, from, dtype, head_dim);
    scratch->end[i] = attention->causal ? position + 1 : total;
    scratch->begin[i] = larger(attention->first_key, attention->window ? position + 1 - attention->window : 0);
    scratch->peak[i] = -INFINITY;
  }
  memset(scratch->sum, 0, heads * rows * dim * sizeof(float));
  memset(scratch->weight, 0, heads * rows * LANES * sizeof(float));

  long here[KEYS] = {0}, next[KEYS];
  uint8_t broken[KEYS];
  long head_bytes = head_dim * element_size(dtype);
  visible_keys(attention, piece, &begin, &end);
  shared_keys(attention, piece, &shared_begin, &shared_end);
  if (fetched->task != task) fetch_task(attention, task, fetched);
  for (long position = begin; position < end; position += KEYS) {
    long count = smaller(KEYS, end - position), columns = round_up(count, 32);
    locate_keys(attention, run, piece.head, position, count, here);
    int partly_hidden = position < shared_begin || position + count > shared_end;
    // As many keys are fetched as are read, from where the last tile left off: across the end of the task, so that the
    // first tile of the next one does not have to wait.
    if (fetched->task == task) fetched->position = larger(fetched->position, position + count);
    locate_next(attention, fetched, upcoming, count, next);
    for (long head = 0; head < heads; head++) {
      const char *keys = (const char *)attention->keys + head * head_bytes;
      const char *values = (const char *)attention->values + head * head_bytes;
      float *score = scratch->score, *sum = scratch->sum + head * rows * dim;
      if (pairs)
        pair_values(values, here, count, head_dim, scratch->value);
      else
        for (long i = 0; i < count; i++) read_floats(scratch->value + i * dim, values + here[i], dtype, head_dim);
      int breaks = partly_hidden && clear_broken(values, here, count, shared_begin - position, shared_end - position,
                                                 head_dim, dim, dtype, pairs, scratch->value, broken);
      pack_keys(keys, here, next, count, head_dim, dtype, pairs, scratch->key);
      multiply_tiles(pairs, rows, columns, scratch->query + head * rows * dim, dim, scratch->key, KEYS,
                     head_dim >> pairs, score, KEYS, 0, (Ahead){values, next, 0});
      for (long i = 0; i < rows; i++) {
        if (attention->softcap) cap_row(score + i * KEYS, columns, attention->scale, attention->softcap);
        float scale = attention->softcap ? 1.0f : attention->scale;
        soften_row(scratch, head * rows + i, score + i * KEYS, position, columns, dim, scale * 1.44269504f);
        if (breaks) break_row(scratch, head * rows + i, score + i * KEYS, position, count, broken);
        if (pairs) pair_numerators(score + i * KEYS, columns);
      }
      multiply_tiles(pairs, rows, dim, score, KEYS, scratch->value, dim, (count + pairs) >> pairs, sum, dim, 1,
                     (Ahead){values, next, element_size(dtype)});
    }
  }

  for (long i = 0; i < heads * rows; i++) {
    float *sum = scratch->sum + i * dim;
    if (pairs) in_order(sum, head_dim);
    floats inverse = splat(1.0f / sum_lanes(load(scratch->weight + i * LANES)));
    for (long j = 0; j < dim; j += LANES) store(sum + j, load(sum + j) * inverse);
    long to = (first_token + query + i % rows / group) * attention->q_heads * head_dim + first_column;
    write_floats(mutable_element(attention->out, dtype, to + (i / rows * group + i % group) * head_dim), sum, dtype,
                 head_dim);
  }
}

static Scratch make_scratch(long head_rows, long heads, long dim) {
  long rows = heads * head_rows, floats_in_all = rows * (2 * dim + LANES + 1 + 4) + (2 * dim + head_rows) * KEYS + 64;
  float *next = thread_scratch(floats_in_all);
  Scratch scratch;
  scratch.query = next;
  scratch.sum = scratch.query + rows * dim;
  scratch.key = scratch.sum + rows * dim;
  scratch.value = scratch.key + KEYS * dim;
  scratch.score = scratch.value + KEYS * dim;
  scratch.weight = scratch.score + head_rows * KEYS;
  scratch.begin = (long *)(scratch.weight + rows * LANES);
  scratch.end = scratch.begin + rows;
  scratch.peak = (float *)(scratch.end + rows);
  memset(next, 0, floats_in_all * sizeof(float));  // the padding of rows and of head_dim stays zero
  return scratch;
}

static void attend(void *context) {
  Attention *attention = context;
  long rows = attention->tile_queries * (attention->q_heads / attention->kv_heads), task, upcoming;
  Scratch scratch = make_scratch(rows, attention->task_heads, round_up(attention->head_dim, DEPTH));
  Fetched fetched = {.task = -1};
  for (task = take_task(&attention->tasks); task >= 0; task = upcoming >= 0 ? upcoming : take_task(&attention->tasks)) {
    upcoming = take_early(&attention->tasks, attention->threads);  // its keys are fetched early
    if (DOT && attention->dtype == BFLOAT16 && attention->head_dim % (2 * LANES) == 0)
      attend_piece(attention, &scratch, task, upcoming, &fetched, DOT);
    else
      attend_piece(attention, &scratch, task, upcoming, &fetched, 0);
  }
}

// Shapes as in interface.py; block_stride is in elements; window 0 means none. Groups of query heads follow their key/value head.
EXPORT void dspark_paged_attention(const void *queries, long stride, const void *keys, const void *values, void *out,
                                   const int32_t *query_start, const int32_t *context_len,
                                   const int32_t *block_tables, long runs, long table_width, long block_size,
                                   long block_stride, long q_heads, long kv_heads, long head_dim, float scale,
                                   float softcap, int causal, long window, long first_key, int dtype,
                                   int threads) {
  long group = q_heads / kv_heads, tile_queries = larger(1, TASK_ROWS / group);
  long *tile_start = malloc((runs + 1) * sizeof(long)), work = 0;
  if (!tile_start) abort();
  tile_start[0] = 0;
  for (long run = 0; run < runs; run++) {
    long run_queries = query_start[run + 1] - query_start[run];
    tile_start[run + 1] = tile_start[run] + (run_queries + tile_queries - 1) / tile_queries;
    work += run_queries * (context_len[run] + run_queries) * q_heads * head_dim;
  }
  // The heads of a token lie side by side in the cache: one thread reads them all, if there are runs for every thread.
  long task_heads = tile_start[runs] >= 4 * threads ? kv_heads : 1;
  Tasks tasks = {0, tile_start[runs] * (kv_heads / task_heads), 1};
  const long worth_a_thread = 65536;  // multiplications of scores; waking the pool costs a few microseconds
  threads = (int)larger(1, smaller(threads, work / worth_a_thread));
  Attention attention = {tasks,       queries,      stride,     keys,         values,   out,
                         query_start, context_len,  block_tables, tile_start, runs,     table_width,
                         block_size,  block_stride * element_size(dtype),     q_heads,  kv_heads,
                         head_dim,    tile_queries, task_heads, window,       first_key, scale,   softcap,
                         causal,      dtype,        threads};
  run_parallel(attend, &attention, threads);
  free(tile_start);
}

// DeepSeek-V4's attention: rows that are key and value in one, compressed entries, and the indexer that chooses them.
//
// A token's result depends on its own rows alone, and each sum has one order: it is the same whatever else is in the
// step. Rows are found by block tables; `start` are the runs' first tokens.
#include "common.h"

enum { TOGETHER = 4 };  // rows, or heads, that share loads

// Rows of one kind in the cache: blocks of `size` rows, `stride` elements from one block to the next.
typedef struct {
  void *rows;
  const int32_t *tables, *context;  // [runs, width]; rows before each run (null where rows are numbered as they are)
  long width, size, stride, channels;
} Pages;

typedef struct {
  const int32_t *start, *positions;
  long runs;
} Runs;

static long run_of(const Runs *runs, long token) {
  long low = 0, high = runs->runs;
  while (high - low > 1) {
    long middle = (low + high) / 2;
    if (runs->start[middle] <= token)
      low = middle;
    else
      high = middle;
  }
  return low;
}

ALWAYS_INLINE void *row_at(const Pages *pages, int dtype, long run, long place) {
  long block = pages->tables[run * pages->width + place / pages->size];
  return mutable_element(pages->rows, dtype, block * pages->stride + place % pages->size * pages->channels);
}

// Pairs (2i, 2i + 1) of the last `rotated` of x's channels; `sign` -1 turns back.
static void rotate(float *x, long channels, const float *cos, long rotated, float sign) {
  const float *sin = cos + rotated / 2;
  float *pairs = x + channels - rotated;
  for (long i = 0; i < rotated / 2; i++) {
    float even = pairs[2 * i], odd = pairs[2 * i + 1], s = sign * sin[i];
    pairs[2 * i] = even * cos[i] - odd * s;
    pairs[2 * i + 1] = odd * cos[i] + even * s;
  }
}

// x / rms(x), times weight where there is one. x is padded with zeros to whole vectors.
static void normalize(float *x, const float *weight, long channels, float eps) {
  long padded = round_up(channels, LANES);
  floats squares = splat(0);
  for (long j = 0; j < padded; j += LANES) squares += load(x + j) * load(x + j);
  float inverse = 1.0f / __builtin_sqrtf(sum_lanes(squares) / channels + eps);
  for (long j = 0; j < channels; j++) x[j] = x[j] * inverse * (weight ? weight[j] : 1.0f);
}

typedef struct {
  Tasks tasks;
  Runs runs;
  const float *x;  // [tokens, stride]
  long stride, rotated;
  const void *norm;
  const float *table;
  const int32_t *slots;
  Pages pages;
  void *out;  // [tokens, channels] instead of the cache
  float eps;
  int dtype;
} Rows;

static void make_rows(void *context) {
  Rows *rows = context;
  long channels = rows->pages.channels, padded = round_up(channels, LANES), first, last;
  float *weight = thread_scratch(2 * padded), *x = weight + padded;
  memset(x, 0, padded * sizeof *x);
  read_floats(weight, rows->norm, rows->dtype, channels);
  while (take_tasks(&rows->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      memcpy(x, rows->x + i * rows->stride, channels * sizeof *x);
      normalize(x, weight, channels, rows->eps);
      rotate(x, channels, rows->table + rows->runs.positions[i] * rows->rotated, rows->rotated, 1);
      long slot = rows->slots ? rows->slots[i] : 0;
      long at = rows->slots ? slot / rows->pages.size * rows->pages.stride + slot % rows->pages.size * channels : 0;
      void *to = rows->slots ? mutable_element(rows->pages.rows, rows->dtype, at)
                             : mutable_element(rows->out, rows->dtype, i * channels);
      write_floats(to, x, rows->dtype, channels);
    }
  }
}

// Normalised and rotated rows [tokens, channels], to the cache's slots, or to `out` (slots null).
EXPORT void dspark_latent_rows(const float *x, long stride, const void *norm, const int32_t *positions,
                               const float *table, long rotated, const int32_t *slots, void *cache, long size,
                               long block_stride, void *out, long tokens, long channels, float eps, int dtype,
                               int threads) {
  Tasks tasks = tasks_of_rows(tokens, 2 * channels, &threads);
  Rows rows = {tasks, {0, positions, 0}, x, stride, rotated, norm, table, slots,
               {cache, 0, 0, 0, size, block_stride, channels}, out, eps, dtype};
  run_parallel(make_rows, &rows, threads);
}

typedef struct {
  Tasks tasks;
  Runs runs;
  const float *values, *gates;  // [tokens, stride]
  long stride;
  const float *places;  // [ratio, columns]
  const int32_t *slots;
  Pages raw, entries;
  const void *norm;
  const float *table;
  long ratio, spans, width, rotated;
  float eps;
  int dtype;
} Compress;

static void keep_tokens(void *context) {
  Compress *compress = context;
  long columns = compress->spans * compress->width, first, last;
  while (take_tasks(&compress->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      long slot = compress->slots[i], at = slot / compress->raw.size * compress->raw.stride;
      float *row = (float *)compress->raw.rows + at + slot % compress->raw.size * 2 * columns;
      const float *place = compress->places + compress->runs.positions[i] % compress->ratio * columns;
      memcpy(row, compress->values + i * compress->stride, columns * sizeof *row);
      for (long j = 0; j < columns; j++) row[columns + j] = compress->gates[i * compress->stride + j] + place[j];
    }
  }
}

static void close_windows(void *context) {
  Compress *compress = context;
  long width = compress->width, padded = round_up(width, LANES), ratio = compress->ratio, first, last;
  long columns = compress->spans * width, seen = compress->spans * ratio;
  float *weight = thread_scratch(4 * padded), *best = weight + padded, *sum = best + padded, *made = sum + padded;
  memset(weight, 0, 4 * padded * sizeof *weight);
  read_floats(weight, compress->norm, compress->dtype, width);
  while (take_tasks(&compress->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      long position = compress->runs.positions[i];
      if ((position + 1) % ratio) continue;
      long run = run_of(&compress->runs, i);
      long place = compress->raw.context[run] + i - compress->runs.start[run];
      for (int pass = 0; pass < 2; pass++) {
        for (long j = 0; j < width; j++) {
          if (pass == 0) best[j] = -INFINITY;
          if (pass == 1) sum[j] = made[j] = 0;
        }
        for (long back = smaller(seen - 1, position); back >= 0; back--) {
          const float *row = row_at(&compress->raw, FLOAT32, run, place - back);
          // Of the window before, the first columns; of its own, the last.
          long from = compress->spans == 2 && back < ratio ? width : 0;
          const float *value = row + from, *gate = row + columns + from;
          if (pass == 0) {
            for (long j = 0; j < width; j++) best[j] = gate[j] > best[j] ? gate[j] : best[j];
          } else {
            long j = 0;
            for (; j + LANES <= width; j += LANES) {
              floats e = exp2_lanes((load(gate + j) - load(best + j)) * 1.44269504f);
              store(sum + j, load(sum + j) + e);
              store(made + j, load(made + j) + e * load(value + j));
            }
            for (; j < width; j++) {
              float e = expf(gate[j] - best[j]);
              sum[j] += e;
              made[j] += e * value[j];
            }
          }
        }
      }
      for (long j = 0; j < width; j++) made[j] /= sum[j];
      normalize(made, weight, width, compress->eps);
      long start = position + 1 - ratio;
      rotate(made, width, compress->table + start * compress->rotated, compress->rotated, 1);
      write_floats(row_at(&compress->entries, compress->dtype, run, start / ratio), made, compress->dtype, width);
    }
  }
}

// Keep what each token brings to its window's entry, and write the entries of windows that are closed.
EXPORT void dspark_compress(const float *values, const float *gates, long stride, const float *places,
                            const int32_t *positions, const int32_t *start, long runs, const int32_t *slots, void *raw,
                            long raw_size, long raw_stride, const int32_t *raw_tables, long raw_width,
                            const int32_t *raw_context, void *entries, long entry_size, long entry_stride,
                            const int32_t *entry_tables, long entry_width, const void *norm, const float *table,
                            long rotated, long tokens, long ratio, long spans, long width, float eps, int dtype,
                            int threads) {
  int keeping = threads, closing = threads;
  Compress compress = {tasks_of_rows(tokens, 2 * spans * width, &keeping),
                       {start, positions, runs},
                       values,
                       gates,
                       stride,
                       places,
                       slots,
                       {raw, raw_tables, raw_context, raw_width, raw_size, raw_stride, 2 * spans * width},
                       {entries, entry_tables, 0, entry_width, entry_size, entry_stride, width},
                       norm,
                       table,
                       ratio,
                       spans,
                       width,
                       rotated,
                       eps,
                       dtype};
  run_parallel(keep_tokens, &compress, keeping);
  compress.tasks = tasks_of_rows(tokens, spans * width * 8, &closing);
  run_parallel(close_windows, &compress, closing);
}

typedef struct {
  Tasks tasks;
  Runs runs;
  const float *queries, *weights;  // [tokens, heads * channels], [tokens, heads], with their strides
  long query_stride, weight_stride, heads, rotated, ratio, most;
  const float *table;
  Pages keys;
  float scale;
  int32_t *chosen;  // [tokens, most], ascending, -1 behind the last
  float *scores;    // [tokens, longest] scratch
  long longest;     // entries that some token sees
  int dtype;
} Choose;

// The k-th greatest of x[0..count), counted from 1; x is reordered.
static float greatest(float *x, long count, long k) {
  long low = 0, high = count - 1, wanted = k - 1;
  while (low < high) {
    float pivot = x[(low + high) / 2];
    long i = low, j = high;
    while (i <= j) {
      while (x[i] > pivot) i++;
      while (x[j] < pivot) j--;
      if (i <= j) {
        float swap = x[i];
        x[i++] = x[j];
        x[j--] = swap;
      }
    }
    if (wanted <= j)
      high = j;
    else if (wanted >= i)
      low = i;
    else
      break;
  }
  return x[wanted];
}

enum { CHUNK = 256 };  // entries that are scored at a time

// Scores of a chunk of a token's entries; lanes are heads.
static void score_entries(void *context) {
  Choose *c = context;
  long channels = c->keys.channels, lanes = round_up(c->heads, LANES), chunks = (c->longest + CHUNK - 1) / CHUNK, first;
  long last;
  float *query = thread_scratch((channels + 1) * lanes + 2 * round_up(channels, LANES)), *weight = query + channels * lanes;
  float *head = weight + lanes, *key = head + round_up(channels, LANES);
  while (take_tasks(&c->tasks, &first, &last)) {
    for (long task = first; task < last; task++) {
      long token = task / chunks, begin = task % chunks * CHUNK, position = c->runs.positions[token];
      long visible = (position + 1) / c->ratio, end = smaller(begin + CHUNK, visible);
      if (visible <= c->most || begin >= end) continue;
      long run = run_of(&c->runs, token);
      memset(query, 0, (channels + 1) * lanes * sizeof *query);
      for (long h = 0; h < c->heads; h++) {
        memcpy(head, c->queries + token * c->query_stride + h * channels, channels * sizeof *head);
        rotate(head, channels, c->table + position * c->rotated, c->rotated, 1);
        for (long j = 0; j < channels; j++) query[j * lanes + h] = head[j];
        weight[h] = c->weights[token * c->weight_stride + h];
      }
      for (long w = begin; w < end; w++) {
        read_floats(key, row_at(&c->keys, c->dtype, run, w), c->dtype, channels);
        floats total = splat(0);
        for (long h = 0; h < lanes; h += LANES) {
          floats even = splat(0), odd = splat(0);
          for (long j = 0; j + 1 < channels; j += 2) {
            even += splat(key[j]) * load(query + j * lanes + h);
            odd += splat(key[j + 1]) * load(query + (j + 1) * lanes + h);
          }
          if (channels % 2) even += splat(key[channels - 1]) * load(query + (channels - 1) * lanes + h);
          floats product = even + odd;
          total += choose(product > splat(0), product, splat(0)) * load(weight + h);
        }
        c->scores[token * c->longest + w] = sum_lanes(total) * c->scale;
      }
    }
  }
}

static void choose_entries(void *context) {
  Choose *c = context;
  long most = c->most, first, last;
  float *sorted = thread_scratch(c->longest);
  while (take_tasks(&c->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      long visible = (c->runs.positions[i] + 1) / c->ratio;
      int32_t *chosen = c->chosen + i * most;
      if (visible <= most) {
        for (long j = 0; j < most; j++) chosen[j] = j < visible ? (int32_t)j : -1;
        continue;
      }
      const float *score = c->scores + i * c->longest;
      memcpy(sorted, score, visible * sizeof *sorted);
      float least = greatest(sorted, visible, most);
      long above = 0, taken = 0;
      for (long w = 0; w < visible; w++) above += score[w] > least;
      long ties = most - above;  // of equal scores the lower entries
      for (long w = 0; w < visible && taken < most; w++)
        if (score[w] > least || (score[w] == least && ties-- > 0)) chosen[taken++] = (int32_t)w;
      for (; taken < most; taken++) chosen[taken] = -1;
    }
  }
}

// The entries of greatest sum_h weight_h relu(q_h . key) * scale that each token sees; none sees more than `longest`.
EXPORT void dspark_choose_entries(const float *queries, long query_stride, const float *weights, long weight_stride,
                                  const int32_t *positions, const int32_t *start, long runs, const void *keys, long size,
                                  long stride, const int32_t *tables, long width, const float *table, long rotated,
                                  int32_t *chosen, float *scores, long tokens, long heads, long channels, long ratio,
                                  long most, long longest, float scale, int dtype, int threads) {
  int choosing = threads;
  Choose c = {{0}, {start, positions, runs}, queries, weights, query_stride, weight_stride, heads, rotated, ratio, most,
              table, {(void *)keys, tables, 0, width, size, stride, channels}, scale, chosen, scores, longest, dtype};
  if (longest > most) {
    c.tasks = tasks_of_rows(tokens * ((longest + CHUNK - 1) / CHUNK), heads * channels * CHUNK / 8, &threads);
    run_parallel(score_entries, &c, threads);
  }
  c.tasks = tasks_of_rows(tokens, 2 * longest, &choosing);
  run_parallel(choose_entries, &c, choosing);
}

typedef struct {
  Tasks tasks;  // of tokens
  const float *logits, *bias;  // [tokens, experts]; null: chosen by their tokens' ids
  int32_t *chosen;             // [tokens, each], given where there is no bias
  float *shares;
  long experts, each;
  float scale;
} Route;

static void route_tokens(void *context) {
  Route *route = context;
  long experts = route->experts, each = route->each, first, last;
  float *score = thread_scratch(2 * experts), *ranked = score + experts;
  while (take_tasks(&route->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      const float *logits = route->logits + i * experts;
      int32_t *chosen = route->chosen + i * each;
      float *shares = route->shares + i * each, sum = 0;
      for (long e = 0; e < experts; e++) {
        score[e] = __builtin_sqrtf(logits[e] > 20 ? logits[e] : log1pf(expf(logits[e])));
        if (route->bias) ranked[e] = score[e] + route->bias[e];
      }
      for (long k = 0; route->bias && k < each; k++) {  // of equal scores the lower expert
        long best = 0;
        for (long e = 1; e < experts; e++) best = ranked[e] > ranked[best] ? e : best;
        chosen[k] = (int32_t)best;
        ranked[best] = -INFINITY;
      }
      for (long k = 0; k < each; k++) sum += shares[k] = score[chosen[k]];
      for (long k = 0; k < each; k++) shares[k] = shares[k] / sum * route->scale;
    }
  }
}

// shares [tokens, each] of the experts of sqrt(softplus(logits)), chosen by that plus a bias, or as given.
EXPORT void dspark_score_experts(const float *logits, const float *bias, int32_t *chosen, float *shares, long tokens,
                                 long experts, long each, float scale, int threads) {
  Route route = {tasks_of_rows(tokens, (each + 8) * experts, &threads), logits, bias, chosen, shares, experts, each,
                 scale};
  run_parallel(route_tokens, &route, threads);
}

typedef struct {
  Tasks tasks;  // parts of LANES heads of tokens
  Runs runs;
  const float *queries;  // [tokens, stride]
  long stride, heads, parts, rotated, seen, first_key;
  const float *table, *sinks;
  Pages window, entries;  // entries.rows null: none
  const void *own;        // [tokens, channels] rows of draft blocks, which see each other whole; null: causal
  const int32_t *chosen;  // [tokens, most]; null: all that are visible
  long ratio, most, longest;
  void *out;
  float scale, eps;
  int dtype;
} Attend;

// `count` rows from `place` on as floats of `padded` channels.
static void read_pages(float *rows, const Pages *pages, int dtype, long run, long place, long count, long padded) {
  const int32_t *table = pages->tables + run * pages->width;
  long block = place / pages->size, within = place % pages->size;
  for (long i = 0; i < count; within = 0) {
    long corner = table[block++] * pages->stride;
    for (; within < pages->size && i < count; within++, i++)
      read_floats(rows + i * padded, element(pages->rows, dtype, corner + within * pages->channels), dtype,
                  pages->channels);
  }
}

// rows[0..) = what a token sees, as floats of `padded` channels; returns their number.
static long gather(const Attend *attend, long token, float *rows, long padded) {
  long run = run_of(&attend->runs, token), begin = attend->runs.start[run];
  long channels = attend->window.channels, position = attend->runs.positions[token];
  int dtype = attend->dtype;
  long last = attend->own ? attend->runs.positions[begin] - 1 : position;  // of those in the cache
  long place = attend->window.context[run] + (attend->own ? -1 : token - begin);
  long from = larger(0, larger(attend->first_key, last - attend->seen + 1)), count = larger(0, last + 1 - from);
  if (count) read_pages(rows, &attend->window, dtype, run, place - (last - from), count, padded);
  for (long j = begin; attend->own && j < attend->runs.start[run + 1]; j++)
    read_floats(rows + count++ * padded, element(attend->own, dtype, j * channels), dtype, channels);
  if (!attend->entries.rows) return count;
  long visible = (position + 1) / attend->ratio;
  if (!attend->chosen) {
    read_pages(rows + count * padded, &attend->entries, dtype, run, 0, visible, padded);
    return count + visible;
  }
  const int32_t *chosen = attend->chosen + token * attend->most;
  for (long j = 0; j < attend->most && chosen[j] >= 0 && chosen[j] < visible; j++)
    read_floats(rows + count++ * padded, row_at(&attend->entries, dtype, run, chosen[j]), dtype, channels);
  return count;
}

// score [count, LANES] = rows * query, whose lanes are heads: query [padded, LANES].
static void score_rows(float *score, const float *rows, const float *query, long count, long channels, long padded) {
  for (long s = 0; s < count; s += TOGETHER) {
    const float *row[TOGETHER];
    floats even[TOGETHER], odd[TOGETHER];
    for (long i = 0; i < TOGETHER; i++) {
      row[i] = rows + smaller(s + i, count - 1) * padded;
      even[i] = odd[i] = splat(0);
    }
    for (long j = 0; j < channels; j += 2) {  // an even number; behind the last stand zeros
      floats first = load(query + j * LANES), second = load(query + (j + 1) * LANES);
      for (long i = 0; i < TOGETHER; i++) {
        even[i] += splat(row[i][j]) * first;
        odd[i] += splat(row[i][j + 1]) * second;
      }
    }
    for (long i = 0; i < smaller(TOGETHER, count - s); i++) store(score + (s + i) * LANES, even[i] + odd[i]);
  }
}

// score [count, LANES] -> shares of rows by the softmax of each lane with its sink.
static void soften(float *score, long count, floats sink, float scale) {
  floats peak = sink, sum;
  for (long s = 0; s < count; s++) {
    floats v = load(score + s * LANES) * scale;
    store(score + s * LANES, v);
    peak = choose(v > peak, v, peak);
  }
  sum = exp2_lanes((sink - peak) * 1.44269504f);
  for (long s = 0; s < count; s++) {
    floats e = exp2_lanes((load(score + s * LANES) - peak) * 1.44269504f);
    store(score + s * LANES, e);
    sum += e;
  }
  floats inverse = 1.0f / sum;
  for (long s = 0; s < count; s++) store(score + s * LANES, load(score + s * LANES) * inverse);
}

// sum [heads, padded] = shares of `heads` heads from `head` on, times rows; inlined for each number of them.
ALWAYS_INLINE void mix_heads(float *sum, const float *score, const float *rows, long head, long count, long padded,
                             int heads) {
  for (long j = 0; j < padded; j += 2 * LANES) {
    long other = j + LANES < padded ? j + LANES : j;
    floats low[TOGETHER], high[TOGETHER];
    for (int h = 0; h < heads; h++) low[h] = high[h] = splat(0);
    for (long s = 0; s < count; s++) {
      floats a = load(rows + s * padded + j), b = load(rows + s * padded + other);
      for (int h = 0; h < heads; h++) {
        floats share = splat(score[s * LANES + head + h]);
        low[h] += a * share;
        high[h] += b * share;
      }
    }
    for (int h = 0; h < heads; h++) {
      store(sum + h * padded + j, low[h]);
      store(sum + h * padded + other, high[h]);
    }
  }
}

static void mix_rows(float *sum, const float *score, const float *rows, long head, long count, long padded,
                     long heads) {
  switch (heads) {
    case 1: return mix_heads(sum, score, rows, head, count, padded, 1);
    case 2: return mix_heads(sum, score, rows, head, count, padded, 2);
    case 3: return mix_heads(sum, score, rows, head, count, padded, 3);
    default: return mix_heads(sum, score, rows, head, count, padded, TOGETHER);
  }
}

static void attend_heads(void *context) {
  Attend *attend = context;
  long channels = attend->window.channels, padded = round_up(channels, LANES), most = attend->longest, first, last;
  float *rows = thread_scratch((most + TOGETHER + 1) * padded + (most + padded) * LANES);
  float *sum = rows + most * padded, *q = sum + TOGETHER * padded, *score = q + padded;
  float *query = score + most * LANES;
  memset(rows, 0, ((most + TOGETHER + 1) * padded + (most + padded) * LANES) * sizeof *rows);
  while (take_tasks(&attend->tasks, &first, &last)) {
    long held = -1, count = 0;
    for (long task = first; task < last; task++) {
      long token = task / attend->parts, begin = task % attend->parts * LANES;
      long heads = smaller(LANES, attend->heads - begin);
      if (token != held) count = gather(attend, held = token, rows, padded);
      const float *cos = attend->table + attend->runs.positions[token] * attend->rotated;
      floats sink = splat(0);
      for (long h = 0; h < LANES; h++) {
        if (h < heads) {
          memcpy(q, attend->queries + token * attend->stride + (begin + h) * channels, channels * sizeof *q);
          normalize(q, 0, channels, attend->eps);
          rotate(q, channels, cos, attend->rotated, 1);
          sink[h] = attend->sinks[begin + h];
        }
        for (long j = 0; j < channels; j++) query[j * LANES + h] = h < heads ? q[j] : 0;
      }
      score_rows(score, rows, query, count, channels, padded);
      soften(score, count, sink, attend->scale);
      for (long head = 0; head < heads; head += TOGETHER) {
        long some = smaller(TOGETHER, heads - head);
        mix_rows(sum, score, rows, head, count, padded, some);
        for (long h = 0; h < some; h++) {
          float *to = sum + h * padded;
          rotate(to, channels, cos, attend->rotated, -1);
          long at = (token * attend->heads + begin + head + h) * channels;
          write_floats(mutable_element(attend->out, attend->dtype, at), to, attend->dtype, channels);
        }
      }
    }
  }
}

// Attention [tokens, heads * channels] over a window and entries, with sinks; queries are normalised and rotated first,
// and the result is rotated back.
EXPORT void dspark_latent_attention(const float *queries, long query_stride, const int32_t *positions,
                                    const int32_t *start, long runs, const float *table, long rotated,
                                    const float *sinks, const void *window, long size, long stride,
                                    const int32_t *tables, long width, const int32_t *context_len, long seen,
                                    long first_key, const void *own, const void *entries, long entry_size,
                                    long entry_stride, const int32_t *entry_tables, long entry_width, long ratio,
                                    const int32_t *chosen, long most, long longest, void *out, long tokens, long heads,
                                    long channels, float scale, float eps, int dtype, int threads) {
  long parts = (heads + LANES - 1) / LANES;
  Tasks tasks = tasks_of_rows(tokens * parts, heads * channels * longest / (4 * parts), &threads);
  Attend attend = {tasks, {start, positions, runs}, queries, query_stride, heads, parts, rotated, seen, first_key,
                   table, sinks, {(void *)window, tables, context_len, width, size, stride, channels},
                   {(void *)entries, entry_tables, 0, entry_width, entry_size, entry_stride, channels}, own, chosen,
                   ratio, most, larger(1, longest), out, scale, eps, dtype};
  run_parallel(attend_heads, &attend, threads);
}

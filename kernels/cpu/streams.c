// Hyper-connections: one normalised row read from a token's residual streams, and an output written into them.
#include "common.h"

enum { MOST_STREAMS = 8, MOST_ROWS = (2 + MOST_STREAMS) * MOST_STREAMS, ROWS = 4, TOKENS = 3 };  // of a tile

typedef struct {
  Tasks tasks;
  const void *streams, *norm;
  void *out;
  float *post, *mixing;
  const float *fn, *base, *scale;
  long count, features, iterations;  // count streams of `features`
  float floor, eps;
  int dtype;
} Read;

// products[t][0..rows) = matrix [rows, length] * x[t] for up to TOKENS tokens, which share the loads of the matrix. Each
// is summed in one order, whatever else is computed beside it.
static void multiply(float products[TOKENS][MOST_ROWS], const float *matrix, const float *x, long tokens, long rows,
                     long length) {
  long whole = length / LANES * LANES;
  for (long r = 0; r < rows; r += ROWS) {
    long some = smaller(ROWS, rows - r);
    const float *row[ROWS], *token[TOKENS];
    floats sums[TOKENS][ROWS];
    for (long i = 0; i < ROWS; i++) row[i] = matrix + (r + smaller(i, some - 1)) * length;
    for (long t = 0; t < TOKENS; t++) {
      token[t] = x + smaller(t, tokens - 1) * length;
      for (long i = 0; i < ROWS; i++) sums[t][i] = splat(0);
    }
    for (long j = 0; j < whole; j += LANES) {
      floats v[TOKENS];
      for (long t = 0; t < TOKENS; t++) v[t] = load(token[t] + j);
      for (long i = 0; i < ROWS; i++) {
        floats w = load(row[i] + j);
        for (long t = 0; t < TOKENS; t++) sums[t][i] += v[t] * w;
      }
    }
    for (long t = 0; t < tokens; t++)
      for (long i = 0; i < some; i++) {
        float sum = sum_lanes(sums[t][i]);
        for (long j = whole; j < length; j++) sum += token[t][j] * row[i][j];
        products[t][r + i] = sum;
      }
  }
}

static float inverse_rms(const float *x, long length, float eps) {
  long whole = length / LANES * LANES;
  floats squares = splat(0);
  for (long j = 0; j < whole; j += LANES) squares += load(x + j) * load(x + j);
  float sum = sum_lanes(squares);
  for (long j = whole; j < length; j++) sum += x[j] * x[j];
  return 1.0f / __builtin_sqrtf(sum / length + eps);
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Softmax of each row, and then Sinkhorn's iterations, columns first.
static void make_stochastic(float *mixing, long n, long iterations, float floor) {
  for (long j = 0; j < n; j++) {
    float *row = mixing + j * n, best = row[0], sum = 0;
    for (long k = 1; k < n; k++) best = row[k] > best ? row[k] : best;
    for (long k = 0; k < n; k++) sum += row[k] = expf(row[k] - best);
    for (long k = 0; k < n; k++) row[k] = row[k] / sum + floor;
  }
  for (long i = 0; i < iterations; i++) {
    for (long j = 0; i && j < n; j++) {
      float sum = floor;
      for (long k = 0; k < n; k++) sum += mixing[j * n + k];
      for (long k = 0; k < n; k++) mixing[j * n + k] *= 1 / sum;
    }
    float sums[MOST_STREAMS];
    for (long k = 0; k < n; k++) sums[k] = floor;
    for (long j = 0; j < n; j++)
      for (long k = 0; k < n; k++) sums[k] += mixing[j * n + k];
    for (long k = 0; k < n; k++) sums[k] = 1 / sums[k];
    for (long j = 0; j < n; j++)
      for (long k = 0; k < n; k++) mixing[j * n + k] *= sums[k];
  }
}

// One token's part: from the products of its row to what is read.
static void read_row(const Read *read, long i, const float *row, const float *products, float *x, const float *weight) {
  long n = read->count, features = read->features;
  float pre[MOST_STREAMS], *post = read->post + i * n, *mixing = read->mixing + i * n * n;
  float scale = inverse_rms(row, n * features, read->eps);
  for (long k = 0; k < (2 + n) * n; k++) {
    long part = k < n ? 0 : k < 2 * n ? 1 : 2;
    float value = products[k] * scale * read->scale[part] + read->base[k];
    if (part == 0)
      pre[k] = sigmoid(value) + read->floor;
    else if (part == 1)
      post[k - n] = 2 * sigmoid(value);
    else
      mixing[k - 2 * n] = value;
  }
  make_stochastic(mixing, n, read->iterations, read->floor);
  memset(x, 0, features * sizeof *x);
  for (long k = 0; k < n; k++)
    for (long j = 0; j < features; j++) x[j] += pre[k] * row[k * features + j];
  round_floats(x, read->dtype, features);  // the norm is of what a layer would have been given
  float inverse = inverse_rms(x, features, read->eps);
  for (long j = 0; j < features; j++) x[j] = x[j] * inverse * weight[j];
  write_floats(mutable_element(read->out, read->dtype, i * features), x, read->dtype, features);
}

static void read_rows(void *context) {
  Read *read = context;
  long n = read->count, features = read->features, length = n * features, first, last;
  float products[TOKENS][MOST_ROWS];
  float *rows = thread_scratch(TOKENS * length + 2 * features), *x = rows + TOKENS * length, *weight = x + features;
  read_floats(weight, read->norm, read->dtype, features);
  while (take_tasks(&read->tasks, &first, &last)) {
    for (long i = first; i < last; i += TOKENS) {
      long tokens = smaller(TOKENS, last - i);
      read_floats(rows, element(read->streams, read->dtype, i * length), read->dtype, tokens * length);
      multiply(products, read->fn, rows, tokens, (2 + n) * n, length);
      for (long t = 0; t < tokens; t++) read_row(read, i + t, rows + t * length, products[t], x, weight);
    }
  }
}

// out [tokens, features] = norm(sum_j pre_j X_j); post [tokens, n] and mixing [tokens, n, n] for the writing.
EXPORT void dspark_read_streams(const void *streams, const float *fn, const float *base, const float *scale,
                                const void *norm, void *out, float *post, float *mixing, long tokens, long count,
                                long features, long iterations, float floor, float eps, int dtype, int threads) {
  Tasks tasks = tasks_of_rows(tokens, (2 + count) * count * count * features / 4, &threads);
  Read read = {tasks, streams, norm, out, post, mixing, fn, base, scale, count, features, iterations, floor, eps, dtype};
  run_parallel(read_rows, &read, threads);
}

typedef struct {
  Tasks tasks;
  void *streams;
  const void *output;
  const float *post, *mixing;
  long count, features;
  int dtype;
} Write;

static void write_rows(void *context) {
  Write *write = context;
  long n = write->count, features = write->features, length = n * features, first, last;
  float *row = thread_scratch(length + 2 * features), *output = row + length, *mixed = output + features;
  while (take_tasks(&write->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      void *streams = mutable_element(write->streams, write->dtype, i * length);
      const float *post = write->post + i * n, *mixing = write->mixing + i * n * n;
      read_floats(row, streams, write->dtype, length);
      read_floats(output, element(write->output, write->dtype, i * features), write->dtype, features);
      for (long k = 0; k < n; k++) {
        for (long j = 0; j < features; j++) mixed[j] = post[k] * output[j];
        for (long s = 0; s < n; s++) {
          float share = mixing[s * n + k];
          const float *from = row + s * features;
          for (long j = 0; j < features; j++) mixed[j] += share * from[j];
        }
        write_floats(mutable_element(streams, write->dtype, k * features), mixed, write->dtype, features);
      }
    }
  }
}

// X'_k = post_k * output + sum_j mixing[j, k] X_j, in place.
EXPORT void dspark_write_streams(void *streams, const void *output, const float *post, const float *mixing, long tokens,
                                 long count, long features, int dtype, int threads) {
  Tasks tasks = tasks_of_rows(tokens, count * count * features, &threads);
  Write write = {tasks, streams, output, post, mixing, count, features, dtype};
  run_parallel(write_rows, &write, threads);
}

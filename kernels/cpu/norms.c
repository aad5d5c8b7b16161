// RMS norm: alone, after the residual's addition, and before it.
#include "common.h"

// row = rms_norm(row) * weight; both are padded with zeros to whole vectors.
ALWAYS_INLINE void normalize(float *row, const float *weight, long features, float eps) {
  long padded = round_up(features, LANES);
  floats squares = {0};
  for (long j = 0; j < padded; j += LANES) squares += load(row + j) * load(row + j);
  float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / features + eps);
  for (long j = 0; j < padded; j += LANES) store(row + j, load(row + j) * scale * load(weight + j));
}

typedef struct {
  Tasks tasks;
  const void *x;
  void *residual;  // null: plain norm
  const void *weight;
  void *out;
  long features, x_stride, residual_stride;  // strides in elements
  float eps;
  int dtype;
} Norm;

static void normalize_rows(void *context) {
  Norm *norm = context;
  long features = norm->features, padded = round_up(features, LANES), first, last;
  int dtype = norm->dtype;
  float *weight = thread_scratch(3 * padded), *row = weight + padded, *sum = row + padded;
  memset(weight, 0, 3 * padded * sizeof(float));  // the padding adds nothing to the sum of squares
  read_floats(weight, norm->weight, dtype, features);
  while (take_tasks(&norm->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      read_floats(row, element(norm->x, dtype, i * norm->x_stride), dtype, features);
      if (norm->residual) {
        void *residual = mutable_element(norm->residual, dtype, i * norm->residual_stride);
        read_floats(sum, residual, dtype, features);
        for (long j = 0; j < padded; j += LANES) store(sum + j, load(sum + j) + load(row + j));
        write_floats(residual, sum, dtype, features);
        read_floats(row, residual, dtype, features);  // the norm is of what was stored
      }
      normalize(row, weight, features, norm->eps);
      write_floats(mutable_element(norm->out, dtype, i * features), row, dtype, features);
    }
  }
}

// out [rows, features] = rms_norm(x) * weight; with a residual: residual += x first, and the norm is of that.
EXPORT void dspark_rms_norm(const void *x, void *residual, const void *weight, void *out, long rows, long features,
                            long x_stride, long residual_stride, float eps, int dtype, int threads) {
  Norm norm = {tasks_of_rows(rows, features, &threads), x, residual, weight, out, features, x_stride,
               residual_stride, eps, dtype};
  run_parallel(normalize_rows, &norm, threads);
}

typedef struct {
  Tasks tasks;
  const void *x;
  void *residual;
  const void *weight;
  long features, x_stride, residual_stride;  // strides in elements
  float eps, scale;
  int dtype;
} NormAdd;

static void add_normalized_rows(void *context) {
  NormAdd *add = context;
  long features = add->features, padded = round_up(features, LANES), first, last;
  int dtype = add->dtype;
  float *weight = thread_scratch(3 * padded), *row = weight + padded, *sum = row + padded;
  memset(weight, 0, 3 * padded * sizeof(float));  // the padding adds nothing to the sum of squares
  read_floats(weight, add->weight, dtype, features);
  while (take_tasks(&add->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      void *residual = mutable_element(add->residual, dtype, i * add->residual_stride);
      read_floats(row, element(add->x, dtype, i * add->x_stride), dtype, features);
      normalize(row, weight, features, add->eps);
      read_floats(sum, residual, dtype, features);
      round_floats(row, dtype, features);
      for (long j = 0; j < padded; j += LANES) store(row + j, load(row + j) + load(sum + j));
      round_floats(row, dtype, features);
      for (long j = 0; j < padded; j += LANES) store(row + j, load(row + j) * add->scale);
      write_floats(residual, row, dtype, features);
    }
  }
}

// residual [rows, features] = (residual + rms_norm(x) * weight) * scale, each step rounded.
EXPORT void dspark_norm_add(const void *x, void *residual, const void *weight, long rows, long features, long x_stride,
                            long residual_stride, float eps, float scale, int dtype, int threads) {
  NormAdd add = {tasks_of_rows(rows, features, &threads), x, residual, weight, features, x_stride, residual_stride, eps,
                 scale, dtype};
  run_parallel(add_normalized_rows, &add, threads);
}

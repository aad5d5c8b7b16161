// activation(gate) * up, and argmax over the vocabulary.
#include "common.h"

#include <math.h>
#include <stdlib.h>

typedef struct {
  Tasks tasks;
  const void *gate_up;
  void *out;
  long features, stride;
  int dtype, gelu;
} Gate;

static void gate_rows(void *context) {
  enum { CHUNK = 1024 };
  Gate *rows = context;
  int dtype = rows->dtype;
  long first, last;
  float *gate = thread_scratch(2 * CHUNK), *up = gate + CHUNK;
  memset(gate, 0, 2 * CHUNK * sizeof(float));
  while (take_tasks(&rows->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      for (long j = 0; j < rows->features; j += CHUNK) {
        long count = smaller(CHUNK, rows->features - j);
        read_floats(gate, element(rows->gate_up, dtype, i * rows->stride + j), dtype, count);
        read_floats(up, element(rows->gate_up, dtype, i * rows->stride + rows->features + j), dtype, count);
        if (rows->gelu)
          for (long c = 0; c < count; c += LANES) store(gate + c, gelu_lanes(load(gate + c)) * load(up + c));
        else
          for (long c = 0; c < count; c += LANES) store(gate + c, silu_lanes(load(gate + c)) * load(up + c));
        write_floats(mutable_element(rows->out, dtype, i * rows->features + j), gate, dtype, count);
      }
    }
  }
}

// gate_up [rows, 2 * features] with the gate first -> out [rows, features]: silu, or gelu by its approximation with
// tanh.
EXPORT void dspark_gate_mul(const void *gate_up, void *out, long rows, long features, long stride, int gelu, int dtype,
                            int threads) {
  Gate gate = {tasks_of_rows(rows, 4 * features, &threads), gate_up, out, features, stride, dtype, gelu};
  run_parallel(gate_rows, &gate, threads);
}

enum {
  SEGMENT = 8192,  // elements of a task: 32 KB of float32
  PIECE = 256,     // elements between two comparisons
};

typedef struct {
  float value;
  int32_t index;
} Best;

typedef struct {
  Tasks tasks;
  const void *logits;
  Best *best;  // [rows, segments]
  long vocabulary, stride, segments;
  int dtype;
} Argmax;

// Is a better than b, which stands at a lower index? NaN is better than every number.
static int better(float a, float b) { return a > b || (a != a && b == b); }

// The maximum of x[0..count), or its first NaN. Blocks of PIECE elements are compared first, so that only one of them is
// searched for the index.
static Best best_of(const float *x, long count) {
  float best = -INFINITY;
  long index = 0;
  for (long start = 0; start < count; start += PIECE) {
    long end = smaller(start + PIECE, count), j = start;
    floats most = splat(-INFINITY);
    integers ordered = (integers)(most == most);
    for (; j + LANES <= end; j += LANES) {
      floats v = load(x + j);
      most = choose(v > most, v, most);
      ordered &= (v == v);
    }
    float value = max_lanes(most);
    int has_nan = 0;
    for (int i = 0; i < LANES; i++) has_nan |= !ordered[i];
    for (; j < end; j++) {
      has_nan |= x[j] != x[j];
      value = x[j] > value ? x[j] : value;
    }
    if (has_nan) {
      for (index = start; x[index] == x[index];) index++;
      return (Best){x[index], (int32_t)index};
    }
    if (value > best) {
      best = value;
      index = start;
    }
  }
  while (x[index] != best) index++;
  return (Best){best, (int32_t)index};
}

static void argmax_segments(void *context) {
  Argmax *argmax = context;
  long first, last;
  while (take_tasks(&argmax->tasks, &first, &last)) {
    for (long task = first; task < last; task++) {
      long row = task / argmax->segments, start = task % argmax->segments * SEGMENT;
      long count = smaller(SEGMENT, argmax->vocabulary - start);
      const void *logits = element(argmax->logits, argmax->dtype, row * argmax->stride + start);
      if (argmax->dtype == BFLOAT16) {
        float *scratch = thread_scratch(SEGMENT);
        read_floats(scratch, logits, BFLOAT16, count);
        logits = scratch;
      }
      argmax->best[task] = best_of(logits, count);
      argmax->best[task].index += (int32_t)start;
    }
  }
}

// out [rows] = lowest index of each row's maximum.
EXPORT void dspark_argmax(const void *logits, int64_t *out, long rows, long vocabulary, long stride, int dtype,
                          int threads) {
  long segments = (vocabulary + SEGMENT - 1) / SEGMENT;
  Tasks tasks = tasks_of_rows(rows * segments, smaller(vocabulary, SEGMENT), &threads);
  Best *best = malloc(rows * segments * sizeof(Best));
  if (!best) abort();
  Argmax argmax = {tasks, logits, best, vocabulary, stride, segments, dtype};
  run_parallel(argmax_segments, &argmax, threads);
  for (long i = 0; i < rows; i++) {
    Best winner = best[i * segments];
    for (long s = 1; s < segments; s++) {
      Best other = best[i * segments + s];
      if (better(other.value, winner.value)) winner = other;
    }
    out[i] = winner.index;
  }
  free(best);
}

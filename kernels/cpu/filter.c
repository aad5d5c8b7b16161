// Rows of logits after top-k, top-p and min-p.
#include "filter.h"

typedef struct {
  Tasks tasks;  // of rows
  const float *logits;               // [*, vocabulary]
  const int64_t *index;              // [rows] into logits
  const float *inverse_temperature;  // [rows]
  const int64_t *top_k;              // [rows] 0: off
  const float *top_p, *min_p;        // [rows] 1, 0: off
  float *out;                        // [rows, vocabulary]
  long vocabulary;
} Filter;

static void filter_rows(void *context) {
  Filter *all = context;
  long vocabulary = all->vocabulary, padded = round_up(vocabulary, LANES), first, last;
  float *scaled = thread_scratch(3 * padded), *weights = scaled + padded, *members = weights + padded;
  while (take_tasks(&all->tasks, &first, &last)) {
    for (long row = first; row < last; row++) {
      const float *logits = all->logits + all->index[row] * vocabulary;
      float *out = all->out + row * vocabulary, scale = all->inverse_temperature[row], max = -INFINITY;
      int broken = 0;
      for (long j = 0; j < vocabulary; j++) {
        broken |= !(logits[j] < INFINITY);
        scaled[j] = logits[j] * scale;
        max = scaled[j] > max ? scaled[j] : max;
      }
      for (long j = vocabulary; j < padded; j++) scaled[j] = -INFINITY;
      memcpy(out, logits, vocabulary * sizeof(float));
      if (broken || !(max > -INFINITY)) continue;
      float floor = filter_floor(scaled, vocabulary, max, all->top_k[row], all->top_p[row], all->min_p[row], weights,
                                 members);
      for (long j = 0; j < vocabulary; j++) out[j] = scaled[j] >= floor ? out[j] : -INFINITY;
    }
  }
}

// Shapes as in Filter.
EXPORT void dspark_filter_logits(const float *logits, const int64_t *index, const float *inverse_temperature,
                                 const int64_t *top_k, const float *top_p, const float *min_p, float *out, long rows,
                                 long vocabulary, int threads) {
  Filter all = {{0, rows, 1}, logits, index, inverse_temperature, top_k, top_p, min_p, out, vocabulary};
  run_parallel(filter_rows, &all, (int)smaller(threads, rows));
}

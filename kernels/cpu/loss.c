// The training loss of a drafter over the vocabulary, and its gradient, without a float32 row ever leaving the cache.
#include "common.h"


typedef struct {
  Tasks tasks;
  void *draft;  // logits in, gradient out
  const void *target;
  const int64_t *target_rows, *labels;
  const float *mass, *ce_weight, *tv_weight;
  float *cross_entropy, *distance;
  long vocabulary;
  int draft_dtype, target_dtype;
} Loss;

static void read_row(float *row, const void *logits, int dtype, long index, long vocabulary, long padded) {
  read_floats(row, element(logits, dtype, index * vocabulary), dtype, vocabulary);
  for (long j = vocabulary; j < padded; j++) row[j] = -INFINITY;
}

static void loss_rows(void *context) {
  // Below this a probability is nothing, and the subnormal numbers it would leave slow matrix products down.
  const floats negligible = splat(1e-20f);
  Loss *loss = context;
  long vocabulary = loss->vocabulary, padded = round_up(vocabulary, LANES), first, last;
  float *p = thread_scratch(2 * padded), *t = p + padded;
  while (take_tasks(&loss->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      float max, ce = loss->ce_weight[i], tv = loss->tv_weight[i];
      read_row(p, loss->draft, loss->draft_dtype, i, vocabulary, padded);
      float label_logit = p[loss->labels[i]];
      float sum = exponentials(p, padded, &max), scale = 1.0f / sum;
      loss->cross_entropy[i] = logf(sum) + max - label_logit;

      read_row(t, loss->target, loss->target_dtype, loss->target_rows[i], vocabulary, padded);
      float mass = loss->mass[loss->target_rows[i]], target_scale = mass / exponentials(t, padded, &max);
      floats distance = {0}, pull = {0};  // sum of |p - t|, and of p * sign(p - t)
      for (long j = 0; j < padded; j += LANES) {
        floats q = load(p + j) * scale, d = q - load(t + j) * target_scale;
        floats magnitude = choose(d < splat(0.0f), -d, d);
        distance += magnitude;
        floats sign = choose(d > splat(0.0f), splat(1.0f), choose(d < splat(0.0f), splat(-1.0f), splat(0.0f)));
        pull += q * sign;
        store(p + j, choose(q < negligible, splat(0.0f), q));
        store(t + j, sign);
      }
      loss->distance[i] = sum_lanes(distance) + 1.0f - mass;
      float offset = ce - tv * sum_lanes(pull);
      for (long j = 0; j < padded; j += LANES) store(p + j, load(p + j) * (load(t + j) * tv + offset));
      p[loss->labels[i]] -= ce;
      write_floats(mutable_element(loss->draft, loss->draft_dtype, i * vocabulary), p, loss->draft_dtype, vocabulary);
    }
  }
}

// draft [rows, V], target [U, V] contiguous, mass [U]; target_rows, labels [rows]; weights and results [rows] float32.
EXPORT void dspark_draft_loss(void *draft, const void *target, const int64_t *target_rows, const int64_t *labels,
                              const float *mass, const float *ce_weight, const float *tv_weight, float *cross_entropy,
                              float *distance, long rows, long vocabulary, int draft_dtype, int target_dtype, int threads) {
  Tasks tasks = tasks_of_rows(rows, 8 * vocabulary, &threads);
  Loss loss = {tasks, draft, target, target_rows, labels, mass, ce_weight, tv_weight, cross_entropy, distance, vocabulary,
               draft_dtype, target_dtype};
  run_parallel(loss_rows, &loss, threads);
}

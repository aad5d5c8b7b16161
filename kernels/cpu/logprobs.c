// Log-probabilities of tokens, their ranks, and the most likely tokens, of rows of raw logits.
#include "filter.h"

typedef struct {
  Tasks tasks;  // of rows
  const float *logits;    // [rows, vocabulary]
  const int64_t *tokens;  // [rows]
  float *own;             // [rows] log-probability of the token
  int64_t *rank;          // [rows] 1: most likely
  int64_t *best;          // [rows, count] the most likely tokens, of equal ones the lower first
  float *values;          // [rows, count] their log-probabilities
  long vocabulary, count;
} LogProbabilities;

// The `count` largest of logits among those not below `least`, in falling order, of equal ones the lower first.
static void select_best(const float *logits, long vocabulary, float least, long count, int64_t *best) {
  long kept = 0;
  for (long j = 0; j < vocabulary; j++) {
    if (!(logits[j] >= least)) continue;
    if (kept == count && !(logits[j] > logits[best[kept - 1]])) continue;
    long place = kept < count ? kept++ : kept - 1;
    for (; place && logits[j] > logits[best[place - 1]]; place--) best[place] = best[place - 1];
    best[place] = j;
  }
  for (; kept < count; kept++) best[kept] = kept;  // rows with NaN
}

static void look_at_rows(void *context) {
  LogProbabilities *all = context;
  long vocabulary = all->vocabulary, whole = vocabulary / STRETCH, first, last;
  float *maxima = thread_scratch(2 * (whole + 1)), *members = maxima + whole + 1;
  while (take_tasks(&all->tasks, &first, &last)) {
    for (long row = first; row < last; row++) {
      const float *logits = all->logits + row * vocabulary;
      float token = logits[all->tokens[row]], max = -INFINITY;
      integers above = {0};
      for (long i = 0; i < whole; i++) {
        floats most = load(logits + i * STRETCH);
        for (long j = 0; j < STRETCH; j += LANES) {
          floats v = load(logits + i * STRETCH + j);
          most = choose(v > most, v, most);
          above -= v > splat(token);
        }
        maxima[i] = max_lanes(most);
        max = maxima[i] > max ? maxima[i] : max;
      }
      long rank = 1;
      for (int lane = 0; lane < LANES; lane++) rank += above[lane];
      for (long j = whole * STRETCH; j < vocabulary; j++) {
        rank += logits[j] > token;
        max = logits[j] > max ? logits[j] : max;
      }
      double sum = 0;
      for (long i = 0; i < whole; i++) {
        floats part = {0};
        for (long j = 0; j < STRETCH; j += LANES)
          part += exp2_lanes((load(logits + i * STRETCH + j) - max) * 1.44269504f);
        sum += sum_lanes(part);
      }
      for (long j = whole * STRETCH; j < vocabulary; j++) sum += exp((double)logits[j] - max);
      float log_sum = (float)log(sum);
      all->rank[row] = rank;
      all->own[row] = token - max - log_sum;
      if (!all->count) continue;
      // The count-th largest of the maxima of stretches is above none of the `count` largest elements.
      float least = whole >= all->count ? kth_largest(maxima, whole, all->count, members) : -INFINITY;
      int64_t *best = all->best + row * all->count;
      select_best(logits, vocabulary, least, all->count, best);
      for (long i = 0; i < all->count; i++) all->values[row * all->count + i] = logits[best[i]] - max - log_sum;
    }
  }
}

// Shapes as in LogProbabilities; count is at most the vocabulary.
EXPORT void dspark_log_probabilities(const float *logits, const int64_t *tokens, float *own, int64_t *rank,
                                     int64_t *best, float *values, long rows, long vocabulary, long count,
                                     int threads) {
  LogProbabilities all = {{0, rows, 1}, logits, tokens, own, rank, best, values, vocabulary, count};
  run_parallel(look_at_rows, &all, (int)smaller(threads, rows));
}

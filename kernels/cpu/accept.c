// Lossless acceptance by the ratio rule (DSpark §3.2.2), for requests whose law is the plain softmax of the target's
// logits: each draft token stands with probability min(1, p / q); the first that does not is replaced by a draw from
// what p has left over, and behind the last stands a draw from p. The rule itself is speculation/acceptance.py's.
#include "draw.h"

#include <stdlib.h>

typedef struct {
  Tasks tasks;  // of requests
  const float *logits;               // [rows, vocabulary]
  const int64_t *start, *lengths;    // [requests] first row, draft tokens
  const int64_t *tokens;             // [requests, width]
  const float *inverse_temperature;  // [requests]
  const float *q;                    // [drafts, slots, columns] of `row`, or null: one-hot at the draft token
  const int64_t *row;                // [requests]
  const int64_t *names;              // token of each column of q, its strides below; or null: the column itself
  const double *coins, *last;        // [requests, coins_stride], [requests, width + 1]
  int64_t *count, *token;            // [requests]
  uint8_t *failed;                   // [requests]
  long vocabulary, width, slots, columns, names_row_stride, names_slot_stride, coins_stride;
} Acceptance;

// weights = what p has left over once q is taken away; p is weights / total. Nothing left: p itself.
static void take_away(const Acceptance *all, float *weights, float *left, float total, long request, long slot) {
  long vocabulary = all->vocabulary, padded = round_up(vocabulary, LANES);
  memcpy(left, weights, padded * sizeof(float));
  if (!all->q) {
    left[all->tokens[request * all->width + slot]] = 0;
  } else {
    const float *q = all->q + (all->row[request] * all->slots + slot) * all->columns;
    const int64_t *names =
        all->names ? all->names + all->row[request] * all->names_row_stride + slot * all->names_slot_stride : 0;
    for (long c = 0; c < all->columns; c++) left[names ? names[c] : c] -= q[c] * total;
    for (long j = 0; j < padded; j += LANES) {
      floats v = load(left + j);
      store(left + j, choose(v > splat(0.0f), v, splat(0.0f)));
    }
  }
  floats any = {0};
  for (long j = 0; j < padded; j += LANES) any += load(left + j);
  if (sum_lanes(any) > 0) memcpy(weights, left, padded * sizeof(float));
}

static float chance_of_draft(const Acceptance *all, long request, long slot, int64_t token) {
  if (!all->q) return 1;
  const float *q = all->q + (all->row[request] * all->slots + slot) * all->columns;
  if (!all->names) return q[token];
  const int64_t *names = all->names + all->row[request] * all->names_row_stride + slot * all->names_slot_stride;
  float sum = 0;
  for (long c = 0; c < all->columns; c++) sum += names[c] == token ? q[c] : 0;
  return sum;
}

static void accept_requests(void *context) {
  Acceptance *all = context;
  long vocabulary = all->vocabulary, padded = round_up(vocabulary, LANES), first, last;
  float *weights = thread_scratch(2 * padded + 2 * (vocabulary / 256 + 16)), *left = weights + padded;
  double *cells = (double *)(left + padded);
  while (take_tasks(&all->tasks, &first, &last)) {
    for (long request = first; request < last; request++) {
      long length = all->lengths[request];
      for (long slot = 0; slot <= length; slot++) {
        const float *logits = all->logits + (all->start[request] + slot) * vocabulary;
        float scale = all->inverse_temperature[request], max;
        int broken = 0;
        for (long j = 0; j < vocabulary; j++) {
          broken |= !(logits[j] < INFINITY);
          weights[j] = logits[j] * scale;
        }
        for (long j = vocabulary; j < padded; j++) weights[j] = -INFINITY;
        float total = broken ? 0 : exponentials(weights, padded, &max);
        if (broken || !(max > -INFINITY)) {
          // A draft token that stands, and whose own row is broken, ends the cycle: the next begins with it.
          all->failed[request] = slot == 0;
          all->count[request] = slot ? slot - 1 : 0;
          all->token[request] = slot ? all->tokens[request * all->width + slot - 1] : -1;
          break;
        }
        if (slot < length) {
          int64_t token = all->tokens[request * all->width + slot];
          double q = chance_of_draft(all, request, slot, token);
          // u q < p, not u < p / q: right at q = 0, and u = 0 does not let a token of probability 0 through.
          if (all->coins[request * all->coins_stride + slot] * q < weights[token] / (double)total) continue;
          take_away(all, weights, left, total, request, slot);
        }
        all->failed[request] = 0;
        all->count[request] = slot;
        all->token[request] = draw_column(weights, vocabulary, all->last[request * (all->width + 1) + slot], cells);
        break;
      }
    }
  }
}

// Shapes as in Acceptance.
EXPORT void dspark_accept_by_ratio(const float *logits, const int64_t *start, const int64_t *lengths,
                                   const int64_t *tokens, const float *inverse_temperature, const float *q,
                                   const int64_t *row, const int64_t *names, const double *coins, const double *last,
                                   int64_t *count, int64_t *token, uint8_t *failed, long requests, long vocabulary,
                                   long width, long slots, long columns, long names_row_stride,
                                   long names_slot_stride, long coins_stride, int threads) {
  Acceptance all = {{0, requests, 1}, logits, start, lengths, tokens, inverse_temperature, q, row, names, coins, last,
                    count, token, failed, vocabulary, width, slots, columns, names_row_stride, names_slot_stride,
                    coins_stride};
  run_parallel(accept_requests, &all, (int)smaller(threads, requests));
}

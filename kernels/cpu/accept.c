// Lossless acceptance by the ratio rule (DSpark §3.2.2) and by the block rule (arXiv 2403.10444), for requests whose law
// is the plain softmax of the target's logits. Ratio: each draft token stands with probability min(1, p / q); the first
// that does not is replaced by a draw from what p has left over, and behind the last stands a draw from p. Block: every
// node is judged, and the last that stands counts. The rules themselves are speculation/acceptance.py's.
#include "draw.h"

#include <math.h>
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

// weights = what `share` of p has left over once q is taken away; p is weights / total. Nothing left: p itself.
static void take_away(const Acceptance *all, float *weights, float *left, float total, float share, long request,
                      long slot) {
  long vocabulary = all->vocabulary, padded = round_up(vocabulary, LANES);
  total /= share;
  memcpy(left, weights, padded * sizeof(float));
  if (!all->q) {
    left[all->tokens[request * all->width + slot]] = 0;  // at most `share` of what is taken from it
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

// A row's softmax in `weights`, and its sum; 0 if it is broken.
static float soften(const Acceptance *all, long request, long slot, float *weights) {
  long vocabulary = all->vocabulary, padded = round_up(vocabulary, LANES);
  const float *logits = all->logits + (all->start[request] + slot) * vocabulary;
  float scale = all->inverse_temperature[request], max;
  int broken = 0;
  for (long j = 0; j < vocabulary; j++) {
    broken |= !(logits[j] < INFINITY);
    weights[j] = logits[j] * scale;
  }
  for (long j = vocabulary; j < padded; j++) weights[j] = -INFINITY;
  float total = broken ? 0 : exponentials(weights, padded, &max);
  return broken || !(max > -INFINITY) ? 0 : total;
}

// The sum over tokens of the lesser of `joint` times p and q: what the draft's next token takes of `joint`.
static double overlap(const Acceptance *all, const float *weights, float total, double joint, long request, long slot) {
  float share = (float)(joint / total);
  if (!all->q) return fmin(1, weights[all->tokens[request * all->width + slot]] * (double)share);
  const float *q = all->q + (all->row[request] * all->slots + slot) * all->columns;
  const int64_t *names =
      all->names ? all->names + all->row[request] * all->names_row_stride + slot * all->names_slot_stride : 0;
  enum { PART = 64 * LANES };  // many small numbers are added up in parts, which keeps their precision
  double sum = 0;
  float mine[LANES];
  for (long first = 0; first < all->columns; first += PART) {
    long end = smaller(first + PART, all->columns), c = first;
    floats part = {0};
    for (; c + LANES <= end; c += LANES) {
      if (names)
        for (long lane = 0; lane < LANES; lane++) mine[lane] = weights[names[c + lane]];
      floats p = load(names ? mine : weights + c) * share, theirs = load(q + c);
      part += choose(p < theirs, p, theirs);
    }
    sum += sum_lanes(part);
    for (; c < end; c++) sum += fminf(weights[names ? names[c] : c] * share, q[c]);
  }
  return sum;
}

static void accept_blocks(void *context) {
  Acceptance *all = context;
  long vocabulary = all->vocabulary, padded = round_up(vocabulary, LANES), first, last;
  float *weights = thread_scratch(3 * padded + 2 * (vocabulary / 256 + 16)), *kept_weights = weights + padded;
  float *left = kept_weights + padded;
  double *cells = (double *)(left + padded);
  while (take_tasks(&all->tasks, &first, &last)) {
    for (long request = first; request < last; request++) {
      long length = all->lengths[request], kept = 0, ends = 0;
      double joint = 1, kept_joint = 1;
      float kept_total = 0;
      for (long slot = 0; !ends; slot++) {
        float total = soften(all, request, slot, weights);
        ends = !total || slot == length;
        double chance = joint;
        if (!ends && slot) {
          double over = joint - overlap(all, weights, total, joint, request, slot);
          over = over > 0 ? over : 0;
          chance = over + 1 - joint > 0 ? over / (over + 1 - joint) : 1;
        }
        if (!slot || all->coins[request * all->coins_stride + slot - 1] < chance) {
          kept = slot;
          kept_joint = joint;
          kept_total = total;
          if (total) memcpy(kept_weights, weights, padded * sizeof(float));
        }
        if (ends) {
          length = slot;
          break;
        }
        int64_t token = all->tokens[request * all->width + slot];
        double q = chance_of_draft(all, request, slot, token);
        joint = q > 0 ? joint * (weights[token] / (double)total) / q : 1;
        if (!(joint < 1)) joint = 1;
      }
      if (!kept_total) {  // a draft token that stands, and whose own row is broken, ends the cycle; so does the anchor's
        all->failed[request] = kept == 0;
        all->count[request] = kept ? kept - 1 : 0;
        all->token[request] = kept ? all->tokens[request * all->width + kept - 1] : -1;
        continue;
      }
      if (kept < length) take_away(all, kept_weights, left, kept_total, (float)kept_joint, request, kept);
      all->failed[request] = 0;
      all->count[request] = kept;
      all->token[request] =
          draw_column(kept_weights, vocabulary, all->last[request * (all->width + 1) + kept], cells);
    }
  }
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
        float total = soften(all, request, slot, weights);
        if (!total) {
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
          take_away(all, weights, left, total, 1, request, slot);
        }
        all->failed[request] = 0;
        all->count[request] = slot;
        all->token[request] = draw_column(weights, vocabulary, all->last[request * (all->width + 1) + slot], cells);
        break;
      }
    }
  }
}

// Shapes as in Acceptance; `jointly`: by the block rule.
EXPORT void dspark_accept(const float *logits, const int64_t *start, const int64_t *lengths, const int64_t *tokens,
                          const float *inverse_temperature, const float *q, const int64_t *row, const int64_t *names,
                          const double *coins, const double *last, int64_t *count, int64_t *token, uint8_t *failed,
                          long requests, long vocabulary, long width, long slots, long columns, long names_row_stride,
                          long names_slot_stride, long coins_stride, int jointly, int threads) {
  Acceptance all = {{0, requests, 1}, logits, start, lengths, tokens, inverse_temperature, q, row, names, coins, last,
                    count, token, failed, vocabulary, width, slots, columns, names_row_stride, names_slot_stride,
                    coins_stride};
  run_parallel(jointly ? accept_blocks : accept_requests, &all, (int)smaller(threads, requests));
}

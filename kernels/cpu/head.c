// The drafter's sequential head: for each slot of a block, the logits are corrected for the token before, a token that
// the context suggests is favoured, and the next token is drawn. One call drafts whole blocks.
#include "draw.h"
#include "filter.h"
#include "rules.h"

typedef struct {
  const float *base;                  // [rows, slots, columns]
  const uint16_t *w1;                 // [V, rank] bfloat16
  const uint16_t *w2;                 // packed [columns, rank]
  const int64_t *names;               // [columns] the token of each column, or null: the column itself
  const float *inverse_temperature;   // [rows], 0: greedy
  const double *uniforms;             // [rows, slots]
  const int64_t *top_k;               // [rows], or null: nothing is filtered
  const float *top_p, *min_p;         // [rows]
  const int64_t *place, *copied;      // [rows, slots] column of the token to favour, and the token; or null
  const uint8_t *named;               // [rows, slots] whether that column is the token's own
  const float *bias;                  // [rows, slots]
  int64_t *tokens;                    // [rows, slots]
  float *law;                         // [rows, slots, columns], or null if all are greedy
  uint8_t *on;                        // [rows, slots]
  float *odds;                        // [rows, slots]
  int64_t *usable;                    // [rows] in: as many slots as there are
  const Rules *rules;                 // [rows], or null
  const int32_t *column;              // [V] the column of each token, -1: none; null: the token itself
  const int64_t *drafted;             // [rows, earlier] draft tokens before the block, of those with rules
  const int64_t *position;            // [rows] of the first slot, of those with rules
  long rows, slots, columns, rank, earlier;
} Head;

typedef struct {
  Tasks tasks;
  const Head *head;
  const float *correction;  // [rows, columns] of this slot, or null
  uint8_t *following;       // [rows]
  long slot;
} Slot;

void dspark_linear(const uint16_t *x, const uint16_t *weight, const float *bias, void *out, long rows, long x_stride,
                   long in_features, long out_features, int out_dtype, int threads);

// logits[0..padded) = base + correction, -infinity in the padding; the maximum, NaN if any is NaN or +infinity.
static float corrected(float *logits, const float *base, const float *correction, long columns) {
  float best = -INFINITY;
  int broken = 0;
  for (long j = 0; j < columns; j++) {
    float value = base[j] + (correction ? correction[j] : 0.0f);
    logits[j] = value;
    broken |= !(value < INFINITY);
    best = value > best ? value : best;
  }
  for (long j = columns; j < round_up(columns, LANES); j++) logits[j] = -INFINITY;
  return broken ? NAN : best;
}

// The logits after the rules of their request; their maximum.
static float ruled(const Head *head, float *logits, long row, long slot) {
  long at = row * head->slots, length = head->earlier + slot;
  int64_t drafted[length + 1];
  if (head->earlier) memcpy(drafted, head->drafted + row * head->earlier, head->earlier * sizeof *drafted);
  memcpy(drafted + head->earlier, head->tokens + at, slot * sizeof *drafted);
  int replaced = head->place && !head->named[at + slot];
  Columns columns = {head->names, head->column, replaced ? head->place[at + slot] : -1,
                     replaced ? head->copied[at + slot] : 0};
  edit(logits, head->columns, &columns, head->rules + row, drafted, length, head->position[row] + slot);
  float best = -INFINITY;
  for (long j = 0; j < head->columns; j++) best = logits[j] > best ? logits[j] : best;
  return best;
}

static void draw_rows(void *context) {
  const float unnamed = -4.0f, few = -20.0f;  // unnamed: UNNAMED of interface.py
  Slot *slot = context;
  const Head *head = slot->head;
  long columns = head->columns, padded = round_up(columns, LANES), first, last;
  float *logits = thread_scratch(3 * padded + 2 * (columns / 256 + 16)), *scratch = logits + padded;
  float *weights = scratch + padded;
  double *cells = (double *)(weights + padded);
  while (take_tasks(&slot->tasks, &first, &last)) {
    for (long row = first; row < last; row++) {
      long at = row * head->slots + slot->slot, choice = 0;
      float scale = head->inverse_temperature[row];
      float best = corrected(logits, head->base + at * columns,
                             slot->correction ? slot->correction + row * columns : 0, columns);
      if (best > -INFINITY && slot->following[row]) {
        long place = head->place[at];
        float max;
        memcpy(scratch, logits, padded * sizeof(float));
        float total = logf(exponentials(scratch, padded, &max)) + max;
        float score = head->named[at] ? logits[place] : total + unnamed;
        float share = expf(score - total);
        float odds = score - total - log1pf(-(share < 1 - 1e-6f ? share : 1 - 1e-6f));
        head->on[at] = 1;
        head->odds[at] = odds > few ? odds : few;
        logits[place] = score + head->bias[at];
      }
      if (best > -INFINITY && head->rules) best = ruled(head, logits, row, slot->slot);
      if (!(best > -INFINITY)) {  // a broken row, or rules that leave no token
        if (head->usable[row] > slot->slot) head->usable[row] = slot->slot;
        head->tokens[at] = head->names ? head->names[0] : 0;
        slot->following[row] = 0;
        if (scale != 0) memset(head->law + at * columns, 0, columns * sizeof(float));
        continue;
      }
      if (scale == 0) {
        best = logits[0];
        for (long j = 1; j < columns; j++) best = logits[j] > best ? logits[j] : best;
        while (logits[choice] != best) choice++;
      } else {
        float *law = head->law + at * columns, max;
        best = -INFINITY;
        for (long j = 0; j < columns; j++) {
          logits[j] *= scale;
          best = logits[j] > best ? logits[j] : best;
        }
        if (head->top_k) {
          float floor = filter_floor(logits, columns, best, head->top_k[row], head->top_p[row], head->min_p[row],
                                     weights, scratch);
          for (long j = 0; j < columns; j++) logits[j] = logits[j] >= floor ? logits[j] : -INFINITY;
        }
        float sum = exponentials(logits, padded, &max), inverse = 1.0f / sum;
        for (long j = 0; j < padded; j++) weights[j] = logits[j] * inverse;
        memcpy(law, weights, columns * sizeof *law);
        choice = draw_column(weights, columns, head->uniforms[at], cells);
      }
      // A column that stands for the favoured token instead of its own.
      int replaced = head->place && !head->named[at] && choice == head->place[at];
      int64_t token = replaced ? head->copied[at] : head->names ? head->names[choice] : choice;
      head->tokens[at] = token;
      if (slot->following[row] && token != head->copied[at]) slot->following[row] = 0;
    }
  }
}

// Shapes as in Head. following [rows]: 1 where a token is to be favoured from the first slot on. x [rows, rank] and
// correction [rows, columns] are scratch; rank 0 is a block without a correction.
EXPORT void dspark_sequential_head(const float *base, const uint16_t *w1, const uint16_t *w2, const int64_t *anchors,
                                   const int64_t *names, const float *inverse_temperature, const double *uniforms,
                                   const int64_t *top_k, const float *top_p, const float *min_p, const int64_t *place, const int64_t *copied, const uint8_t *named,
                                   const float *bias, uint8_t *following, uint16_t *x, float *correction,
                                   int64_t *tokens, float *law, uint8_t *on, float *odds, int64_t *usable,
                                   const Rules *rules, const int32_t *column, const int64_t *drafted,
                                   const int64_t *position, long rows, long slots, long columns, long rank,
                                   long earlier, int threads) {
  Head head = {base, w1,  w2, names, inverse_temperature, uniforms, top_k, top_p, min_p, place, copied, named, bias, tokens, law,
               on, odds,  usable, rules, column, drafted, position, rows, slots, columns, rank, earlier};
  for (long k = 0; k < slots; k++) {
    if (rank) {
      for (long row = 0; row < rows; row++) {
        int64_t before = k ? tokens[row * slots + k - 1] : anchors[row];
        memcpy(x + row * rank, w1 + before * rank, rank * sizeof *x);
      }
      dspark_linear(x, w2, 0, correction, rows, rank, rank, columns, FLOAT32, threads);
    }
    int used = threads;
    Slot slot = {tasks_of_rows(rows, 4 * columns, &used), &head, rank ? correction : 0, following, k};
    run_parallel(draw_rows, &slot, used);
  }
}

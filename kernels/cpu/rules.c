// Rows of logits after their requests' rules.
#include "rules.h"

typedef struct {
  Tasks tasks;  // of requests
  float *logits;                   // [*, vocabulary]
  const int64_t *start, *lengths;  // [requests] first row, and number of draft tokens: one row less than it has
  const int64_t *tokens;           // [requests, width] draft tokens
  const Rules *rules;              // [requests]
  const int64_t *position;         // [requests] of the first row
  long vocabulary, width;
} Ruled;

static void edit_requests(void *context) {
  Ruled *all = context;
  Columns columns = {0, 0, -1, 0};
  long first, last;
  while (take_tasks(&all->tasks, &first, &last))
    for (long request = first; request < last; request++)
      for (long slot = 0; slot <= all->lengths[request]; slot++)
        edit(all->logits + (all->start[request] + slot) * all->vocabulary, all->vocabulary, &columns,
             all->rules + request, all->tokens + request * all->width, slot, all->position[request] + slot);
}

// Shapes as in Ruled.
EXPORT void dspark_apply_rules(float *logits, const int64_t *start, const int64_t *lengths, const int64_t *tokens,
                               const Rules *rules, const int64_t *position, long requests, long vocabulary, long width,
                               int threads) {
  Ruled all = {{0, requests, 1}, logits, start, lengths, tokens, rules, position, vocabulary, width};
  run_parallel(edit_requests, &all, (int)smaller(threads, requests));
}

// Edits of one request's logits before temperature: masks, biases, penalties (interface.py: Rules).
#ifndef DSPARK_RULES_H
#define DSPARK_RULES_H

#include "common.h"

// Null pointers are rules that the request does not have; all zero is a request without rules.
typedef struct {
  const int64_t *touched;  // tokens that a bias or a penalty may change
  const float *bias;       // [V]
  const uint8_t *seen;     // [V] tokens of prompt and answer; null: no penalties
  const float *counts;     // [V] of the answer's tokens; null: none yet
  const uint8_t *allowed;  // [V]
  const int64_t *words;    // each bad word's length, and its tokens
  const int64_t *tail;     // last tokens of the answer
  const int64_t *early;    // tokens that may not appear before position `until`
  int64_t touched_count, words_length, tail_length, early_count, until;
  float repetition, frequency, presence, unused;
} Rules;

// The columns of a row of logits. All null: column v is token v.
typedef struct {
  const int64_t *names;    // [columns] the token of each
  const int32_t *column;   // [V] the column of each token, -1: none
  long replaced;           // a column that holds `copied` instead of its own token, -1: none
  int64_t copied;
} Columns;

ALWAYS_INLINE long column_of(const Columns *columns, int64_t token) {
  if (columns->replaced >= 0 && token == columns->copied) return columns->replaced;
  long column = columns->column ? columns->column[token] : (long)token;
  return column == columns->replaced ? -1 : column;
}

ALWAYS_INLINE void forbid(float *logits, const Columns *columns, int64_t token) {
  long column = column_of(columns, token);
  if (column >= 0) logits[column] = -INFINITY;
}

// A logit x of `token`, which is `more` times among the draft tokens before it.
ALWAYS_INLINE float edited(const Rules *rules, int64_t token, float x, int more) {
  if (rules->bias) x += rules->bias[token];
  if (!rules->seen) return x;
  if (more || rules->seen[token]) x = x > 0 ? x / rules->repetition : x * rules->repetition;
  float count = (rules->counts ? rules->counts[token] : 0.0f) + (float)more;
  if (count > 0) x -= rules->frequency * count + rules->presence;
  return x;
}

// Whether the tokens of the answer, `drafted` [length] included, end with word[0 .. count - 1).
static inline int nearly(const Rules *rules, const int64_t *word, long count, const int64_t *drafted, long length) {
  for (long back = 1; back < count; back++) {
    long from_end = length - back;
    if (from_end < 0 && rules->tail_length + from_end < 0) return 0;
    int64_t token = from_end >= 0 ? drafted[from_end] : rules->tail[rules->tail_length + from_end];
    if (token != word[count - 1 - back]) return 0;
  }
  return 1;
}

// Edit logits [count] of the token at `position`, before which stand the draft tokens `drafted` [length].
static void edit(float *logits, long count, const Columns *columns, const Rules *rules, const int64_t *drafted,
                 long length, long position) {
  if (rules->allowed) {
    for (long j = 0; j < count; j++) {
      int64_t token = j == columns->replaced ? columns->copied : columns->names ? columns->names[j] : j;
      if (!rules->allowed[token]) logits[j] = -INFINITY;
    }
  }
  for (long at = 0; at < rules->words_length; at += 1 + rules->words[at])
    if (nearly(rules, rules->words + at + 1, rules->words[at], drafted, length))
      forbid(logits, columns, rules->words[at + rules->words[at]]);
  if (position < rules->until)
    for (long i = 0; i < rules->early_count; i++) forbid(logits, columns, rules->early[i]);

  // Draft tokens first, from logits that nothing has changed yet, and written last.
  float values[length + 1];
  long places[length + 1], kept = 0;
  for (long i = 0; rules->seen && i < length; i++) {
    int more = 0, before = 0;
    for (long k = 0; k < length; k++) {
      more += drafted[k] == drafted[i];
      before += k < i && drafted[k] == drafted[i];
    }
    long column = before ? -1 : column_of(columns, drafted[i]);
    if (column < 0) continue;
    places[kept] = column;
    values[kept++] = edited(rules, drafted[i], logits[column], more);
  }
  for (long i = 0; i < rules->touched_count; i++) {
    long column = column_of(columns, rules->touched[i]);
    if (column >= 0) logits[column] = edited(rules, rules->touched[i], logits[column], 0);
  }
  for (long i = 0; i < kept; i++) logits[places[i]] = values[i];
}

#endif

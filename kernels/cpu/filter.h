// Top-k, top-p and min-p as a floor under a row's logits. What a floor needs of their order, counts and masses by the bits of
// the numbers tell: first by the upper 11 bits, then, among those that share them, by the next 11, then by the last 10.
// Nothing is sorted, so a row costs about the same however its logits are spread.
#ifndef DSPARK_FILTER_H
#define DSPARK_FILTER_H

#include "common.h"

enum { DIGITS = 3, BUCKETS = 2048, STRETCH = 4 * LANES };

static const int SHIFT[DIGITS] = {21, 10, 0};
static const uint32_t LAST[DIGITS] = {2047, 2047, 1023};

// A digit of x: numbers in rising order have rising digits, the upper one first.
ALWAYS_INLINE long digit(float x, int number) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return bits >> SHIFT[number] & LAST[number];
}

// The k-th largest of values [count]. members is scratch as long, and may be `values`.
static inline float kth_largest(const float *values, long count, long k, float *members) {
  for (int number = 0; number < DIGITS; number++) {
    int32_t counts[BUCKETS] = {0};
    for (long j = 0; j < count; j++) counts[digit(values[j], number)]++;
    long bucket = LAST[number], kept = 0;
    while (counts[bucket] < k) k -= counts[bucket--];
    for (long j = 0; j < count; j++)
      if (digit(values[j], number) == bucket) members[kept++] = values[j];
    values = members;
    count = kept;
  }
  return members[0];
}

// The elements of scaled [columns] (its padding holds -infinity) that may be among the k largest -> members; their number.
// Where more than k stretches have a maximum, the k-th largest of these is below none of the k largest elements.
static inline long candidates(const float *scaled, long columns, long k, float *members) {
  long padded = round_up(columns, LANES), stretches = padded / STRETCH, kept = 0;
  float least = -INFINITY;
  if (stretches > k) {
    for (long i = 0; i < stretches; i++) {
      floats best = load(scaled + i * STRETCH);
      for (long j = LANES; j < STRETCH; j += LANES) {
        floats v = load(scaled + i * STRETCH + j);
        best = choose(v > best, v, best);
      }
      members[i] = max_lanes(best);
    }
    least = kth_largest(members, stretches, k, members);
  }
  for (long j = 0; j < columns; j++)
    if (scaled[j] >= least) members[kept++] = scaled[j];
  return kept;
}

// The smallest of the nucleus: in falling order, those before which less than top_p of the mass at or above `floor` lies.
static inline float smallest_of_nucleus(const float *scaled, long columns, float max, float floor, float top_p,
                                        float *weights, float *members) {
  double total = 0, before = 0;
  long padded = round_up(columns, LANES), count = 0;
  for (long first = 0; first < padded; first += STRETCH) {
    floats sum = {0};
    for (long j = first; j < smaller(first + STRETCH, padded); j += LANES) {
      floats v = load(scaled + j);
      floats weight = exp2_lanes((choose(v >= splat(floor), v, splat(-INFINITY)) - max) * 1.44269504f);
      store(weights + j, weight);
      sum += weight;
    }
    total += sum_lanes(sum);
  }
  // What all elements this light hold together is less than what the nucleus leaves out.
  float light = (float)((1 - (double)top_p) * total / (double)columns * 0.999);
  for (long j = 0; j < columns; j++) {
    if (!(weights[j] > light)) continue;
    members[count] = scaled[j];
    weights[count++] = weights[j];
  }
  double wanted = (double)top_p * total;
  for (int number = 0; number < DIGITS; number++) {
    double masses[BUCKETS] = {0};
    long bucket = 0, least = LAST[number], kept = 0;
    for (long j = 0; j < count; j++) {
      long here = digit(members[j], number);
      masses[here] += weights[j];
      least = here < least ? here : least;
      bucket = here > bucket ? here : bucket;
    }
    while (bucket > least && before + masses[bucket] < wanted) before += masses[bucket--];
    for (long j = 0; j < count; j++) {
      if (digit(members[j], number) != bucket) continue;
      members[kept] = members[j];
      weights[kept++] = weights[j];
    }
    count = kept;
  }
  return members[0];
}

// The least that a row's filters leave of `scaled` [columns], whose padding holds -infinity and whose maximum is `max`: each
// acts on what the ones before it left. top_k 0, top_p 1, min_p 0: off. weights and members are scratch as long as scaled.
static inline float filter_floor(const float *scaled, long columns, float max, long top_k, float top_p, float min_p,
                                 float *weights, float *members) {
  float floor = min_p > 0 ? max + logf(min_p) : -INFINITY;
  if (top_k > 0 && top_k < columns) {
    long count = candidates(scaled, columns, top_k, members);
    floor = fmaxf(floor, kth_largest(members, count, top_k, members));
  }
  if (top_p < 1) floor = smallest_of_nucleus(scaled, columns, max, floor, top_p, weights, members);
  return floor;
}

#endif

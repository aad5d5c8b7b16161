// Top-k, top-p and min-p as a floor under a row's logits. What a floor needs of their order, counts and masses by distance
// from the maximum tell, but for one narrow bucket, which alone is sorted.
#ifndef DSPARK_FILTER_H
#define DSPARK_FILTER_H

#include "common.h"

#include <stdlib.h>

enum { BUCKETS = 2048, PER_NAT = 64 };  // 32 nats below the maximum; the last bucket holds what is further away

static inline int falling(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x < y) - (x > y);
}

ALWAYS_INLINE long bucket_of(float scaled, float max) {
  float distance = (max - scaled) * PER_NAT;
  return distance < BUCKETS - 1 ? (long)distance : BUCKETS - 1;  // -infinity goes into the last
}

// The elements of a bucket in falling order -> members; how many there are.
static inline long sorted_bucket(const float *scaled, long columns, float max, float floor, long bucket, float *members) {
  long count = 0;
  for (long j = 0; j < columns; j++)
    if (scaled[j] >= floor && bucket_of(scaled[j], max) == bucket) members[count++] = scaled[j];
  qsort(members, count, sizeof *members, falling);
  return count;
}

// The k-th largest of scaled.
static inline float kth_largest(const float *scaled, long columns, float max, long k, float *members) {
  long counts[BUCKETS] = {0}, before = 0, bucket = 0;
  for (long j = 0; j < columns; j++) counts[bucket_of(scaled[j], max)]++;
  while (before + counts[bucket] < k) before += counts[bucket++];
  sorted_bucket(scaled, columns, max, -INFINITY, bucket, members);
  return members[k - before - 1];
}

// The smallest of the nucleus: in falling order, those before which less than top_p of the mass at or above `floor` lies.
static inline float smallest_of_nucleus(const float *scaled, long columns, float max, float floor, float top_p,
                                 float *weights, float *members) {
  double masses[BUCKETS] = {0}, total = 0, before = 0;
  long padded = round_up(columns, LANES), bucket = 0, last = 0;
  for (long j = 0; j < padded; j += LANES) {
    floats v = load(scaled + j);
    store(weights + j, exp2_lanes((choose(v >= splat(floor), v, splat(-INFINITY)) - max) * 1.44269504f));
  }
  for (long j = 0; j < columns; j++) {
    if (!(weights[j] > 0)) continue;
    long here = bucket_of(scaled[j], max);
    masses[here] += weights[j];
    last = here > last ? here : last;
  }
  for (long i = 0; i < BUCKETS; i++) total += masses[i];
  double wanted = (double)top_p * total;
  while (bucket < last && before + masses[bucket] < wanted) before += masses[bucket++];
  long count = sorted_bucket(scaled, columns, max, floor, bucket, members), i = 0;
  for (; i < count - 1; i++) {
    before += exp((double)members[i] - max);
    if (before >= wanted) break;
  }
  return members[i];
}

// The least that a row's filters leave of `scaled` [columns], whose padding holds -infinity and whose maximum is `max`: each
// acts on what the ones before it left. top_k 0, top_p 1, min_p 0: off. weights and members are scratch as long as scaled.
static inline float filter_floor(const float *scaled, long columns, float max, long top_k, float top_p, float min_p,
                                 float *weights, float *members) {
  float floor = min_p > 0 ? max + logf(min_p) : -INFINITY;
  if (top_k > 0 && top_k < columns) floor = fmaxf(floor, kth_largest(scaled, columns, max, top_k, members));
  if (top_p < 1) floor = smallest_of_nucleus(scaled, columns, max, floor, top_p, weights, members);
  return floor;
}

#endif

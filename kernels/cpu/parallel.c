// Threads and scratch. There is no OpenMP of our own: a second pool would spin against torch's on the same cores, so
// Python hands over the entry point of the libgomp that torch has loaded.
#include "common.h"

#include <stdlib.h>

typedef void (*parallel_function)(void (*body)(void *), void *context, unsigned threads, unsigned flags);

static parallel_function torch_parallel;  // GOMP_parallel, or null: one thread then

EXPORT void dspark_set_parallel(void *gomp_parallel) { torch_parallel = (parallel_function)gomp_parallel; }

EXPORT int dspark_lanes(void) { return LANES; }

void run_parallel(void (*body)(void *context), void *context, int threads) {
  if (torch_parallel && threads > 1) {
    torch_parallel(body, context, (unsigned)threads, 0);
  } else {
    body(context);
  }
}

float *thread_scratch(long count) {
  static _Thread_local float *memory;
  static _Thread_local long capacity;
  if (count > capacity) {
    free(memory);
    capacity = round_up(count, 16384);
    memory = aligned_alloc(64, capacity * sizeof(float));
    if (!memory) abort();
  }
  return memory;
}

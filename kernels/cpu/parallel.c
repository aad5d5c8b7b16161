// The thread team that runs every kernel, and scratch memory.
//
// A team for machines that have other work too. A thread that waits spins for a moment, as the next piece of work is
// mostly a few microseconds away. Then it yields its processor again and again, which costs others nothing, through the
// gaps between steps: waking up from sleep takes longer, and comes in the middle of a step. But where other threads keep
// the processor it sleeps after the moment: it would use up the time that the scheduler gives to the thread that it waits
// for, and one that sleeps gets the processor back sooner than one that yielded. The server's event loop and a client on
// the same machine take the processor for some milliseconds of a step, too; yielding serves them. Work goes to those that
// run: a region ends when its tasks are done and the threads inside have left; a thread that has not come until then is
// not waited for.
//
// A region is open, or not. `gate` says so, and how many workers are inside; a worker enters with a compare-and-swap of
// the whole word, so none can enter once the caller has closed it, and `body` and `context` stay valid while any is
// inside. Both sleeps follow one pattern: announce the sleep, look again, sleep on the value seen; and on the other
// side: change the value, then look for sleepers. All of that is sequentially consistent.
#define _GNU_SOURCE
#include "common.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

enum {
  INSIDE = 0xffff,   // of the gate: workers inside
  OPEN = 1 << 16,    // of the gate: workers may enter
  REGION = 1 << 17,  // of the gate: one more region; wraps
  MOST = 1024,       // threads
  MORE = 4,          // threads that join at most while other threads keep the processors; measured with two cores
  LOOKS = 32,        // between two looks at the clock
  // Nanoseconds:
  SPIN = 50000,          // of spinning: longer than the gaps between kernels (some 10 us)
  YIELDING = 5000000,    // of spinning and yielding: longer than the gaps between steps
  LATE = 1000000,        // without the processor: longer than a kernel of another pool, shorter than a scheduler's slice
  CAUTION = 1000000000,  // without yielding once other threads have kept the processor; twice as long if they still do
  // Other threads keep the processor if more than a SHAREth of the time is lost to them, by at least this much:
  SHARE = 8,
  CREDIT = 20000000,
};

static const long MOST_CAUTION = 16 * (long)CAUTION;

static struct {
  _Alignas(64) uint32_t gate;
  _Alignas(64) uint32_t bell;     // changes when a region opens while workers sleep
  uint32_t sleepers;              // workers that sleep, or are about to
  _Alignas(64) uint32_t resting;  // the caller sleeps, or is about to
  uint32_t busy;                  // a caller has the team
  int workers;                    // started so far
  long crowded;                   // until this time other threads keep the processors
  long caution;                   // nanoseconds until then, when it was set
  long lost, counted;             // nanoseconds lost beyond a SHAREth of the time; when that was computed
  // Of the open region:
  void (*body)(void *context);
  void *context;
  uint32_t places;  // for workers
} team;

EXPORT int dspark_lanes(void) { return LANES; }

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static long now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000L + time.tv_nsec;
}

// Counts `gap` nanoseconds of a waiting thread without the processor. Threads that do so at once may miscount a little.
static void count_lost(long time, long gap) {
  long before = __atomic_exchange_n(&team.counted, time, __ATOMIC_RELAXED);
  long lost = __atomic_load_n(&team.lost, __ATOMIC_RELAXED) - (time - before) / SHARE;
  lost = (lost > 0 ? lost : 0) + gap;
  if (lost > CREDIT) {
    long caution = __atomic_load_n(&team.caution, __ATOMIC_RELAXED);
    int again = time - __atomic_load_n(&team.crowded, __ATOMIC_RELAXED) < CAUTION;
    caution = again ? smaller(2 * caution, MOST_CAUTION) : CAUTION;
    __atomic_store_n(&team.caution, caution, __ATOMIC_RELAXED);
    __atomic_store_n(&team.crowded, time + caution, __ATOMIC_RELAXED);
    lost = 0;
  }
  __atomic_store_n(&team.lost, lost, __ATOMIC_RELAXED);
}

typedef struct {
  long begun, last;  // times of the first look at the clock and of the last
  int looks;
} Wait;

// Waits between two looks at what is waited for; 0 if the thread should sleep.
static int linger(Wait *wait) {
  pause_briefly();
  if (++wait->looks % LOOKS) return 1;
  long time = now();
  if (!wait->begun) wait->begun = wait->last = time;
  if (time - wait->last > LATE) count_lost(time, time - wait->last);
  wait->last = time;
  long waited = time - wait->begun;
  if (waited < SPIN) return 1;
  if (waited > YIELDING || time < __atomic_load_n(&team.crowded, __ATOMIC_RELAXED)) return 0;
  sched_yield();
  return 1;
}

// Sleep while *word is `seen`; may wake early.
static void sleep_on(uint32_t *word, uint32_t seen) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
#else
  if (__atomic_load_n(word, __ATOMIC_SEQ_CST) == seen) usleep(50);
#endif
}

static void wake(uint32_t *word, int count) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, 0, 0, 0);
#endif
}

static int is_new(uint32_t gate, uint32_t seen) { return (gate & OPEN) && gate / REGION != seen; }

// The gate of an open region other than `seen`.
static uint32_t wait_for_region(uint32_t seen) {
  uint32_t last = seen;
  for (Wait wait = {0};;) {
    uint32_t gate = __atomic_load_n(&team.gate, __ATOMIC_ACQUIRE);
    if (is_new(gate, seen)) return gate;
    if (gate / REGION != last) {  // there is work, though it was over before this thread came
      last = gate / REGION;
      wait.begun = 0;
    }
    if (linger(&wait)) continue;
    __atomic_add_fetch(&team.sleepers, 1, __ATOMIC_SEQ_CST);
    uint32_t bell = __atomic_load_n(&team.bell, __ATOMIC_SEQ_CST);
    if (!is_new(__atomic_load_n(&team.gate, __ATOMIC_SEQ_CST), seen)) sleep_on(&team.bell, bell);
    __atomic_sub_fetch(&team.sleepers, 1, __ATOMIC_SEQ_CST);
    wait.begun = 0;
  }
}

static void *work(void *unused) {
  (void)unused;
  uint32_t seen = -1;
  for (;;) {
    uint32_t gate = wait_for_region(seen);
    while (is_new(gate, seen)) {
      if ((gate & INSIDE) >= __atomic_load_n(&team.places, __ATOMIC_RELAXED)) {
        seen = gate / REGION;  // full
      } else if (__atomic_compare_exchange_n(&team.gate, &gate, gate + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE)) {
        seen = gate / REGION;
        team.body(team.context);
        uint32_t left = __atomic_sub_fetch(&team.gate, 1, __ATOMIC_SEQ_CST);
        if (!(left & (OPEN | INSIDE)) && __atomic_load_n(&team.resting, __ATOMIC_SEQ_CST)) wake(&team.gate, 1);
      }
    }
  }
  return 0;
}

// A child has none of its parent's threads.
static void forget_workers(void) { memset(&team, 0, sizeof team); }

static void start_workers(int count) {
  static int known;
  if (!known) known = !pthread_atfork(0, 0, forget_workers);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for Python's threads
  while (team.workers < smaller(count, MOST)) {
    pthread_t thread;
    if (pthread_create(&thread, 0, work, 0)) break;  // with fewer, then
    pthread_detach(thread);
    team.workers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, 0);
}

static void wait_for_workers(void) {
  uint32_t gate = __atomic_and_fetch(&team.gate, ~(uint32_t)OPEN, __ATOMIC_SEQ_CST);
  for (Wait wait = {0}; gate & INSIDE && linger(&wait);) gate = __atomic_load_n(&team.gate, __ATOMIC_ACQUIRE);
  if (!(gate & INSIDE)) return;
  __atomic_store_n(&team.resting, 1, __ATOMIC_SEQ_CST);
  while ((gate = __atomic_load_n(&team.gate, __ATOMIC_SEQ_CST)) & INSIDE) sleep_on(&team.gate, gate);
  __atomic_store_n(&team.resting, 0, __ATOMIC_SEQ_CST);
}

void run_parallel(void (*body)(void *context), void *context, int threads) {
  // The team serves one caller at a time; another one meanwhile works alone.
  if (threads < 2 || __atomic_exchange_n(&team.busy, 1, __ATOMIC_ACQUIRE)) {
    body(context);
    return;
  }
  // The scheduler gives each runnable thread its turn: beside neighbours, more threads get more of the time. Who comes
  // too late is not waited for.
  long crowded = __atomic_load_n(&team.crowded, __ATOMIC_RELAXED);
  if (crowded && now() < crowded) threads += smaller(threads, MORE);
  if (team.workers < threads - 1) start_workers(threads - 1);
  team.body = body;
  team.context = context;
  __atomic_store_n(&team.places, threads - 1, __ATOMIC_RELAXED);
  uint32_t closed = __atomic_load_n(&team.gate, __ATOMIC_RELAXED);
  __atomic_store_n(&team.gate, closed + REGION + OPEN, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&team.sleepers, __ATOMIC_SEQ_CST)) {
    __atomic_add_fetch(&team.bell, 1, __ATOMIC_SEQ_CST);
    wake(&team.bell, threads - 1);
  }
  body(context);
  wait_for_workers();
  __atomic_store_n(&team.busy, 0, __ATOMIC_RELEASE);
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

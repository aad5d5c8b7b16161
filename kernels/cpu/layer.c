// A whole decoder layer in one call: the same kernels in the same order as models/decoder.py has them, without a trip
// through Python between them (some 8 us each, which at one request is a sixth of a pass). bfloat16 throughout.
//
// Each kernel shares its own work out, and what one thread wrote the others read next: between cores that share no
// cache that is a tenth to a quarter of a pass. Where there are many tokens every thread takes some through all that
// comes before attention, and again through all that comes after it; it then reads all the weights, and nothing of
// what another wrote.
#include "common.h"

enum {
  // Tokens for which a thread reads all the weights rather than what others wrote, times the threads that share memory
  // with it: measured with two. SLICE are always enough; a thread that has more than twice as many takes several.
  FEW = 6,
  SLICE = 48,
};

void dspark_rms_norm(const void *x, void *residual, const void *weight, void *out, long rows, long features,
                     long x_stride, long residual_stride, float eps, int dtype, int threads);
void dspark_linear(const uint16_t *x, const uint16_t *weight, const float *bias, void *out, long rows, long x_stride,
                   long in_features, long out_features, int out_dtype, int threads);
void dspark_rotary_kv_write(void *qkv, long stride, const int32_t *positions, const float *cos_sin,
                            const int32_t *slots, void *keys, void *values, long block_size, long block_stride,
                            long tokens, long q_heads, long kv_heads, long head_dim, const void *q_norm, const void *k_norm, float eps, int shared_values, int value_norm,
                            int dtype, int threads);
void dspark_paged_attention(const void *queries, long stride, const void *keys, const void *values, void *out,
                            const int32_t *query_start, const int32_t *context_len, const int32_t *block_tables,
                            long runs, long table_width, long block_size, long block_stride, long q_heads,
                            long kv_heads, long head_dim, float scale, float softcap, int causal, long window,
                            long first_key, int dtype, int threads);
void dspark_gated_linear(const uint16_t *x, const uint16_t *weight, const float *bias, uint16_t *out, long rows,
                         long x_stride, long in_features, long features, int threads);

// As in native.py. Weights are packed, biases null or padded to whole blocks.
typedef struct {
  const uint16_t *input_norm, *post_attention_norm, *q_norm, *k_norm;
  const uint16_t *qkv, *output, *gate_up, *down;
  const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias;
  long hidden, features, q_heads, kv_heads, head_dim, window;
  float eps, scale;
} Layer;

// A layer's call.
typedef struct {
  Tasks tasks;  // slices of tokens, all of about the same size
  const Layer *layer;
  uint16_t *delta, *residual;
  uint16_t *x;     // [tokens, hidden or queries] scratch: normed, then attention's output
  uint16_t *wide;  // [tokens, qkv's rows], then [tokens, hidden + features]: normed, then the product of gate and up
  const int32_t *positions, *slots;
  const float *cos_sin;
  void *keys, *values;
  long block_size, block_stride;
  long tokens;
  int first;
} Pass;

static long queries_of(const Layer *layer) { return layer->q_heads * layer->head_dim; }

static long qkv_of(const Layer *layer) { return queries_of(layer) + 2 * layer->kv_heads * layer->head_dim; }

// What comes before attention, of `count` tokens from `start` on: queries into `wide`, keys and values into the cache.
static void project(const Pass *pass, long start, long count, int threads) {
  const Layer *layer = pass->layer;
  long hidden = layer->hidden, width = qkv_of(layer);
  uint16_t *x = pass->x + start * hidden, *wide = pass->wide + start * width;
  uint16_t *delta = pass->delta + start * hidden, *residual = pass->residual + start * hidden;
  dspark_rms_norm(pass->first ? residual : delta, pass->first ? 0 : residual, layer->input_norm, x, count, hidden,
                  hidden, hidden, layer->eps, BFLOAT16, threads);
  dspark_linear(x, layer->qkv, layer->qkv_bias, wide, count, hidden, hidden, width, BFLOAT16, threads);
  dspark_rotary_kv_write(wide, width, pass->positions + start, pass->cos_sin, pass->slots + start, pass->keys,
                         pass->values, pass->block_size, pass->block_stride, count, layer->q_heads, layer->kv_heads, layer->head_dim, layer->q_norm,
                         layer->k_norm, layer->eps, 0, 0, BFLOAT16, threads);
}

// What comes after it, of the same tokens.
static void transform(const Pass *pass, long start, long count, int threads) {
  const Layer *layer = pass->layer;
  long hidden = layer->hidden, features = layer->features, queries = queries_of(layer);
  uint16_t *x = pass->wide + start * (hidden + features), *activated = x + count * hidden;
  uint16_t *delta = pass->delta + start * hidden, *residual = pass->residual + start * hidden;
  dspark_linear(pass->x + start * queries, layer->output, layer->output_bias, delta, count, queries, queries, hidden,
                BFLOAT16, threads);
  dspark_rms_norm(delta, residual, layer->post_attention_norm, x, count, hidden, hidden, hidden, layer->eps, BFLOAT16,
                  threads);
  dspark_gated_linear(x, layer->gate_up, layer->gate_up_bias, activated, count, hidden, hidden, features, threads);
  dspark_linear(activated, layer->down, layer->down_bias, delta, count, features, features, hidden, BFLOAT16, threads);
}

typedef void (*stage)(const Pass *pass, long start, long count, int threads);

ALWAYS_INLINE void take_slices(Pass *pass, stage stage) {
  long first, last;
  while (take_tasks(&pass->tasks, &first, &last)) {
    long start = pass->tokens * first / pass->tasks.count;
    stage(pass, start, pass->tokens * last / pass->tasks.count - start, 1);
  }
}

static void project_slices(void *context) { take_slices(context, project); }

static void transform_slices(void *context) { take_slices(context, transform); }

static void run_stage(Pass *pass, stage whole, void (*slices)(void *context), int threads) {
  if (threads == 1 || pass->tokens < threads * smaller(FEW * threads, SLICE)) {
    whole(pass, 0, pass->tokens, threads);
    return;
  }
  // As many slices for each thread; several, where there are enough tokens, so that who is late leaves some to others.
  pass->tasks = (Tasks){0, threads * larger(1, smaller(4, pass->tokens / (SLICE * threads))), 1};
  run_parallel(slices, pass, threads);
}

// Shapes as in interface.py; features is a multiple of 32. delta [tokens, hidden]: in, what the layer before returned,
// unless this is the first; out, this layer's. scratch [tokens, narrow + wide], narrow the larger of hidden and
// queries, wide of qkv's rows and hidden + features.
EXPORT void dspark_decoder_layer(const Layer *layer, uint16_t *delta, int first, uint16_t *residual,
                                 const int32_t *positions, const float *cos_sin, const int32_t *slots, void *keys,
                                 void *values, const int32_t *query_start, const int32_t *context_len,
                                 const int32_t *block_tables, long tokens, long runs, long table_width,
                                 long block_size, long block_stride, int causal, uint16_t *scratch, int threads) {
  uint16_t *wide = scratch + tokens * larger(layer->hidden, queries_of(layer));
  Pass pass = {{0}, layer, delta, residual, scratch, wide, positions, slots, cos_sin, keys, values, block_size,
               block_stride, tokens, first};
  run_stage(&pass, project, project_slices, threads);
  dspark_paged_attention(wide, qkv_of(layer), keys, values, pass.x, query_start, context_len, block_tables, runs,
                         table_width, block_size, block_stride, layer->q_heads, layer->kv_heads, layer->head_dim,
                         layer->scale, 0, causal, layer->window, 0, BFLOAT16, threads);
  run_stage(&pass, transform, transform_slices, threads);
}

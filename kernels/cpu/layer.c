// A whole decoder layer in one call: the same kernels in the same order as models/decoder.py has them, without a trip
// through Python between them (some 8 us each, which at one request is a sixth of a pass). bfloat16 throughout.
#include "common.h"

void dspark_rms_norm(const void *x, void *residual, const void *weight, void *out, long rows, long features,
                     long x_stride, long residual_stride, float eps, int dtype, int threads);
void dspark_linear(const uint16_t *x, const uint16_t *weight, const float *bias, void *out, long rows, long x_stride,
                   long in_features, long out_features, int out_dtype, int threads);
void dspark_rotary_kv_write(void *qkv, long stride, const int32_t *positions, const float *cos_sin,
                            const int32_t *slots, void *keys, void *values, long tokens, long q_heads, long kv_heads,
                            long head_dim, const void *q_norm, const void *k_norm, float eps, int dtype, int threads);
void dspark_paged_attention(const void *queries, long stride, const void *keys, const void *values, void *out,
                            const int32_t *query_start, const int32_t *context_len, const int32_t *block_tables,
                            long runs, long table_width, long block_size, long q_heads, long kv_heads, long head_dim,
                            float scale, int causal, long window, int dtype, int threads);
void dspark_silu_mul(const void *gate_up, void *out, long rows, long features, long stride, int dtype, int threads);

// As in native.py. Weights are packed, biases null or padded to whole blocks.
typedef struct {
  const uint16_t *input_norm, *post_attention_norm, *q_norm, *k_norm;
  const uint16_t *qkv, *output, *gate_up, *down;
  const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias;
  long hidden, features, q_heads, kv_heads, head_dim, window;
  float eps, scale;
} Layer;

// Shapes as in interface.py. delta [tokens, hidden]: in, what the layer before returned, unless this is the first; out,
// this layer's. scratch [tokens, narrow + wide], narrow the largest of hidden, queries and features, wide the larger
// of qkv's and gate_up's rows.
EXPORT void dspark_decoder_layer(const Layer *layer, uint16_t *delta, int first, uint16_t *residual,
                                 const int32_t *positions, const float *cos_sin, const int32_t *slots, void *keys,
                                 void *values, const int32_t *query_start, const int32_t *context_len,
                                 const int32_t *block_tables, long tokens, long runs, long table_width,
                                 long block_size, int causal, uint16_t *scratch, int threads) {
  long hidden = layer->hidden, features = layer->features, queries = layer->q_heads * layer->head_dim;
  long width = queries + 2 * layer->kv_heads * layer->head_dim;
  uint16_t *x = scratch, *wide = scratch + tokens * larger(larger(hidden, queries), features);
  dspark_rms_norm(first ? residual : delta, first ? 0 : residual, layer->input_norm, x, tokens, hidden, hidden, hidden,
                  layer->eps, BFLOAT16, threads);
  dspark_linear(x, layer->qkv, layer->qkv_bias, wide, tokens, hidden, hidden, width, BFLOAT16, threads);
  dspark_rotary_kv_write(wide, width, positions, cos_sin, slots, keys, values, tokens, layer->q_heads,
                         layer->kv_heads, layer->head_dim, layer->q_norm, layer->k_norm, layer->eps, BFLOAT16, threads);
  dspark_paged_attention(wide, width, keys, values, x, query_start, context_len, block_tables, runs, table_width,
                         block_size, layer->q_heads, layer->kv_heads, layer->head_dim, layer->scale, causal,
                         layer->window, BFLOAT16, threads);
  dspark_linear(x, layer->output, layer->output_bias, delta, tokens, queries, queries, hidden, BFLOAT16, threads);
  dspark_rms_norm(delta, residual, layer->post_attention_norm, x, tokens, hidden, hidden, hidden, layer->eps, BFLOAT16,
                  threads);
  dspark_linear(x, layer->gate_up, layer->gate_up_bias, wide, tokens, hidden, hidden, 2 * features, BFLOAT16, threads);
  dspark_silu_mul(wide, x, tokens, features, 2 * features, BFLOAT16, threads);
  dspark_linear(x, layer->down, layer->down_bias, delta, tokens, features, features, hidden, BFLOAT16, threads);
}

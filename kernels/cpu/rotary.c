// Rotary embedding of q in place and of k into the cache, v into the cache, with an optional norm of each head before.
#include "common.h"

enum { OCTET = 8 };  // squares are summed in so many lanes, whatever the processor's

typedef struct {
  Tasks tasks;
  void *qkv;
  long stride;  // elements from one token's row to the next
  const int32_t *positions, *slots;
  const float *cos_sin;
  void *keys, *values;
  long block_size, block_stride;  // tokens of a block; elements from one block to the next
  long q_heads, kv_heads, head_dim;
  const void *q_norm, *k_norm;  // null: no norm
  float eps;
  int shared_values, value_norm, dtype;  // v is k as it came; v is normalised without a weight
} Rotary;

// 1 / rms of a head; behind it stand zeros up to a multiple of OCTET.
static float inverse_rms(const float *head, long head_dim, float eps) {
  float squares = 0;
  for (long j = 0; j < head_dim; j += OCTET) {
    float part[OCTET];
    for (int i = 0; i < OCTET; i++) part[i] = head[j + i] * head[j + i];
    squares += ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
  }
  return 1.0f / __builtin_sqrtf(squares / head_dim + eps);
}

// dst = norm(src) of one head, without a weight.
static void normalise_head(const Rotary *rotary, void *dst, const void *src, float *head) {
  read_floats(head, src, rotary->dtype, rotary->head_dim);
  float scale = inverse_rms(head, rotary->head_dim, rotary->eps);
  for (long j = 0; j < rotary->head_dim; j++) head[j] *= scale;
  write_floats(dst, head, rotary->dtype, rotary->head_dim);
}

// dst = rotate(norm(src)) of one head; `head` and `norm_weight` are float scratch of head_dim, and behind `head` stand
// zeros up to a multiple of OCTET.
static void rotate_head(const Rotary *rotary, void *dst, const void *src, const float *cos, float *restrict head,
                        const float *restrict norm_weight) {
  long head_dim = rotary->head_dim, half = head_dim / 2;
  const float *sin = cos + half;
  read_floats(head, src, rotary->dtype, head_dim);
  if (norm_weight) {
    float scale = inverse_rms(head, head_dim, rotary->eps);
    for (long j = 0; j < head_dim; j++) head[j] = head[j] * scale * norm_weight[j];
  }
  float *restrict high = head + half;
  for (long j = 0; j < half; j++) {
    float a = head[j], b = high[j];
    head[j] = a * cos[j] - b * sin[j];
    high[j] = b * cos[j] + a * sin[j];
  }
  write_floats(dst, head, rotary->dtype, head_dim);
}

static void rotate_tokens(void *context) {
  Rotary *rotary = context;
  long head_dim = rotary->head_dim, q_heads = rotary->q_heads, kv_heads = rotary->kv_heads, first, last;
  int dtype = rotary->dtype;
  long padded = round_up(head_dim, OCTET);
  float *head = thread_scratch(3 * padded), *q_norm = NULL, *k_norm = NULL;
  memset(head, 0, padded * sizeof(float));
  if (rotary->q_norm) read_floats(q_norm = head + padded, rotary->q_norm, dtype, head_dim);
  if (rotary->k_norm) read_floats(k_norm = head + 2 * padded, rotary->k_norm, dtype, head_dim);
  while (take_tasks(&rotary->tasks, &first, &last)) {
    for (long i = first; i < last; i++) {
      const float *cos = rotary->cos_sin + rotary->positions[i] * head_dim;
      void *row = mutable_element(rotary->qkv, dtype, i * rotary->stride);
      for (long h = 0; h < q_heads; h++) {
        void *q = mutable_element(row, dtype, h * head_dim);
        rotate_head(rotary, q, q, cos, head, q_norm);
      }
      long block = rotary->slots[i] / rotary->block_size, within = rotary->slots[i] % rotary->block_size;
      long at = block * rotary->block_stride + within * kv_heads * head_dim;
      for (long h = 0; h < kv_heads; h++) {
        const void *k = element(row, dtype, (q_heads + h) * head_dim);
        rotate_head(rotary, mutable_element(rotary->keys, dtype, at + h * head_dim), k, cos, head, k_norm);
      }
      const void *v = element(row, dtype, (q_heads + (rotary->shared_values ? 0 : kv_heads)) * head_dim);
      if (rotary->value_norm)
        for (long h = 0; h < kv_heads; h++)
          normalise_head(rotary, mutable_element(rotary->values, dtype, at + h * head_dim),
                         element(v, dtype, h * head_dim), head);
      else
        memcpy(mutable_element(rotary->values, dtype, at), v, kv_heads * head_dim * element_size(dtype));
    }
  }
}

EXPORT void dspark_rotary_kv_write(void *qkv, long stride, const int32_t *positions, const float *cos_sin,
                                   const int32_t *slots, void *keys, void *values, long block_size,
                                   long block_stride, long tokens, long q_heads, long kv_heads, long head_dim, const void *q_norm, const void *k_norm, float eps,
                                   int shared_values, int value_norm, int dtype, int threads) {
  Tasks tasks = tasks_of_rows(tokens, (q_heads + 2 * kv_heads) * head_dim, &threads);
  Rotary rotary = {tasks,   qkv,      stride,   positions, slots,  cos_sin, keys, values, block_size, block_stride,
                   q_heads, kv_heads, head_dim, q_norm,    k_norm, eps,     shared_values, value_norm, dtype};
  run_parallel(rotate_tokens, &rotary, threads);
}

/* A paged, quantized KV cache from C: two sequences share a prompt of six tokens, then decode a token each. */
#include <math.h>
#include <onepass/onepass_c.h>
#include <stdio.h>
#include <stdlib.h>

enum { SEQUENCES = 2, MAX_PAGES = 4, PAGES = 6, PAGE_SIZE = 4, HEADS = 4, HEADS_KV = 2, DIM = 32, PROMPT = 6 };

static void check(onepass_status status) {
  if (status == ONEPASS_OK) return;
  fprintf(stderr, "%s\n", onepass_last_error());
  exit(1);
}

static onepass_tensor tensor(void* data, onepass_dtype dtype, int rank, const int64_t* shape) {
  onepass_tensor t = ONEPASS_TENSOR_INIT;
  int64_t stride = 1;
  t.data = data;
  t.dtype = dtype;
  t.rank = rank;
  for (int i = rank - 1; i >= 0; --i) {
    t.shape[i] = shape[i];
    t.strides[i] = stride;
    stride *= shape[i];
  }
  return t;
}

static void fill(float* values, int count, float phase) {
  for (int i = 0; i < count; ++i) values[i] = sinf(phase + 0.37f * (float)i);
}

int main(void) {
  /* The cache: int8 keys and values with a scale for each head of each token; which page is whose. */
  static int8_t k[PAGES * HEADS_KV * PAGE_SIZE * DIM], v[PAGES * HEADS_KV * PAGE_SIZE * DIM];
  static float k_scale[PAGES * HEADS_KV * PAGE_SIZE], v_scale[PAGES * HEADS_KV * PAGE_SIZE];
  int32_t table[SEQUENCES * MAX_PAGES], seqlens[SEQUENCES] = {0}, references[PAGES] = {0};
  for (int i = 0; i < SEQUENCES * MAX_PAGES; ++i) table[i] = -1;
  const int64_t storage[] = {PAGES, HEADS_KV, PAGE_SIZE, DIM}, table_shape[] = {SEQUENCES, MAX_PAGES};
  const int64_t sequences[] = {SEQUENCES}, pages[] = {PAGES};
  onepass_tensor tk = tensor(k, ONEPASS_INT8, 4, storage), tv = tensor(v, ONEPASS_INT8, 4, storage);
  onepass_tensor tk_scale = tensor(k_scale, ONEPASS_FLOAT32, 3, storage);
  onepass_tensor tv_scale = tensor(v_scale, ONEPASS_FLOAT32, 3, storage);
  onepass_tensor ttable = tensor(table, ONEPASS_INT32, 2, table_shape);
  onepass_tensor tseqlens = tensor(seqlens, ONEPASS_INT32, 1, sequences);
  onepass_tensor treferences = tensor(references, ONEPASS_INT32, 1, pages);
  onepass_kv_cache cache = ONEPASS_KV_CACHE_INIT;
  cache.k = &tk;
  cache.v = &tv;
  cache.k_scale = &tk_scale;
  cache.v_scale = &tv_scale;
  cache.scale_granularity = ONEPASS_SCALE_HEAD;
  cache.page_table = &ttable;
  cache.seqlens = &tseqlens;
  onepass_page_pool pool = ONEPASS_PAGE_POOL_INIT;
  pool.page_table = &ttable;
  pool.seqlens = &tseqlens;
  pool.reference_counts = &treferences;
  pool.page_size = PAGE_SIZE;

  /* Prefill of sequence 0: its keys and values are stored. (A model would attend in the same call, as below.) */
  static float k_prompt[PROMPT * HEADS_KV * DIM], v_prompt[PROMPT * HEADS_KV * DIM];
  fill(k_prompt, PROMPT * HEADS_KV * DIM, 0.0f);
  fill(v_prompt, PROMPT * HEADS_KV * DIM, 1.0f);
  const int64_t prompt[] = {PROMPT, HEADS_KV, DIM}, bounds_shape[] = {SEQUENCES + 1}, prompt_counts[] = {PROMPT, 0};
  int32_t bounds[] = {0, PROMPT, PROMPT};
  onepass_tensor tk_prompt = tensor(k_prompt, ONEPASS_FLOAT32, 3, prompt);
  onepass_tensor tv_prompt = tensor(v_prompt, ONEPASS_FLOAT32, 3, prompt);
  onepass_tensor tbounds = tensor(bounds, ONEPASS_INT32, 1, bounds_shape);
  onepass_append_options append = ONEPASS_APPEND_OPTIONS_INIT;
  append.cu_seqlens = &tbounds;
  onepass_page_copy copies[SEQUENCES];
  size_t num_copies = 0;
  check(onepass_page_pool_reserve(&pool, prompt_counts, copies, &num_copies));
  check(onepass_append_kv(&cache, &tk_prompt, &tv_prompt, &append, NULL));

  /* Sequence 1 shares the prompt; the half-full page is copied when the two go apart. */
  check(onepass_page_pool_fork(&pool, 0, 1, ONEPASS_WHOLE_SEQUENCE));
  const int64_t one_each[] = {1, 1};
  check(onepass_page_pool_reserve(&pool, one_each, copies, &num_copies));
  check(onepass_copy_pages(&cache, copies, num_copies));
  int64_t free_pages = 0;
  check(onepass_page_pool_free_pages(&pool, &free_pages));
  printf("%zu page copied, %lld of %d free\n", num_copies, (long long)free_pages, PAGES);

  /* A token each: the same query, keys that differ. Stored and attended to in one call. */
  static float q[SEQUENCES * HEADS * DIM], out[SEQUENCES * HEADS * DIM], lse[SEQUENCES * HEADS];
  static float k_new[SEQUENCES * HEADS_KV * DIM], v_new[SEQUENCES * HEADS_KV * DIM];
  fill(q, HEADS * DIM, 0.5f);
  fill(q + HEADS * DIM, HEADS * DIM, 0.5f);
  fill(k_new, SEQUENCES * HEADS_KV * DIM, 2.0f);
  fill(v_new, SEQUENCES * HEADS_KV * DIM, 3.0f);
  const int64_t query[] = {SEQUENCES, HEADS, 1, DIM}, token[] = {SEQUENCES, HEADS_KV, 1, DIM};
  onepass_tensor tq = tensor(q, ONEPASS_FLOAT32, 4, query), tout = tensor(out, ONEPASS_FLOAT32, 4, query);
  onepass_tensor tlse = tensor(lse, ONEPASS_FLOAT32, 3, query);
  onepass_tensor tk_new = tensor(k_new, ONEPASS_FLOAT32, 4, token), tv_new = tensor(v_new, ONEPASS_FLOAT32, 4, token);
  onepass_attention_outputs outputs = ONEPASS_ATTENTION_OUTPUTS_INIT;
  outputs.out = &tout;
  outputs.lse = &tlse;
  onepass_cached_options options = ONEPASS_CACHED_OPTIONS_INIT;
  options.k_new = &tk_new;
  options.v_new = &tv_new;
  check(onepass_cached_attention(&tq, &cache, &outputs, &options, NULL));
  for (int b = 0; b < SEQUENCES; ++b) {
    printf("sequence %d: %d tokens, out %.4f %.4f …, lse %.4f\n", b, seqlens[b], out[b * HEADS * DIM],
           out[b * HEADS * DIM + 1], lse[b * HEADS]);
  }
  return num_copies == 1 && seqlens[0] == PROMPT + 1 && seqlens[1] == PROMPT + 1 && lse[0] != lse[HEADS] ? 0 : 1;
}

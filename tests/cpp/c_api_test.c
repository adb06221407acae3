/* The C interface from C: every function, what it computes, and what it says when it refuses. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onepass/onepass_c.h"

static int failures = 0;

#define CHECK(condition)                                                                             \
  do {                                                                                               \
    if (!(condition)) {                                                                              \
      printf("%s:%d: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, onepass_last_error()); \
      ++failures;                                                                                    \
    }                                                                                                \
  } while (0)

#define CHECK_OK(call) CHECK((call) == ONEPASS_OK)

/* The call fails with `status`, and the message holds both parts. */
#define CHECK_REFUSED(call, status, argument, required)    \
  do {                                                     \
    CHECK((call) == (status));                             \
    CHECK(strstr(onepass_last_error(), argument) != NULL); \
    CHECK(strstr(onepass_last_error(), required) != NULL); \
  } while (0)

/* The gradients come from the reference, which has every operation in every build. */
static onepass_context reference(void) {
  onepass_context context = ONEPASS_CONTEXT_INIT;
  context.backend = "reference";
  return context;
}

static int near(double a, double b) { return fabs(a - b) < 1e-5; }

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

/* One batch, two query heads on one key head, 3 queries, 4 keys, head_dim 2; q is 0, so that every weight is 1/4. */
enum { HEADS = 2, QUERIES = 3, KEYS = 4, DIM = 2 };
static const int64_t query_shape[] = {1, HEADS, QUERIES, DIM}, key_shape[] = {1, 1, KEYS, DIM};
static const int64_t lse_shape[] = {1, HEADS, QUERIES}, total_shape[] = {1, HEADS, KEYS};

typedef struct {
  float q[HEADS * QUERIES * DIM], k[KEYS * DIM], v[KEYS * DIM];
  float out[HEADS * QUERIES * DIM], lse[HEADS * QUERIES], total[HEADS * KEYS];
  float dout[HEADS * QUERIES * DIM], dq[HEADS * QUERIES * DIM], dk[KEYS * DIM], dv[KEYS * DIM];
  onepass_tensor tq, tk, tv, tout, tlse, ttotal, tdout, tdq, tdk, tdv;
  onepass_attention_outputs outputs;
  onepass_attention_gradients gradients;
} fixture;

static void prepare(fixture* f) {
  memset(f, 0, sizeof(*f));
  for (int i = 0; i < KEYS * DIM; ++i) {
    f->k[i] = (float)(i % 3) - 1.0f;
    f->v[i] = (float)i;
  }
  for (int i = 0; i < HEADS * QUERIES * DIM; ++i) f->dout[i] = 1.0f;
  for (int i = 0; i < HEADS * QUERIES * DIM; ++i) f->out[i] = -77.0f;
  f->tq = tensor(f->q, ONEPASS_FLOAT32, 4, query_shape);
  f->tk = tensor(f->k, ONEPASS_FLOAT32, 4, key_shape);
  f->tv = tensor(f->v, ONEPASS_FLOAT32, 4, key_shape);
  f->tout = tensor(f->out, ONEPASS_FLOAT32, 4, query_shape);
  f->tlse = tensor(f->lse, ONEPASS_FLOAT32, 3, lse_shape);
  f->ttotal = tensor(f->total, ONEPASS_FLOAT32, 3, total_shape);
  f->tdout = tensor(f->dout, ONEPASS_FLOAT32, 4, query_shape);
  f->tdq = tensor(f->dq, ONEPASS_FLOAT32, 4, query_shape);
  f->tdk = tensor(f->dk, ONEPASS_FLOAT32, 4, key_shape);
  f->tdv = tensor(f->dv, ONEPASS_FLOAT32, 4, key_shape);
  f->outputs = (onepass_attention_outputs)ONEPASS_ATTENTION_OUTPUTS_INIT;
  f->outputs.out = &f->tout;
  f->outputs.lse = &f->tlse;
  f->outputs.total_attention = &f->ttotal;
  f->gradients = (onepass_attention_gradients)ONEPASS_ATTENTION_GRADIENTS_INIT;
  f->gradients.dq = &f->tdq;
  f->gradients.dk = &f->tdk;
  f->gradients.dv = &f->tdv;
}

static onepass_status forward(fixture* f, const onepass_attention_options* options, const onepass_context* context) {
  return onepass_attention(&f->tq, &f->tk, &f->tv, &f->outputs, options, context);
}

static void test_attention(void) {
  fixture f;
  const onepass_context context = reference();
  prepare(&f);
  CHECK_OK(forward(&f, NULL, NULL));
  for (int row = 0; row < HEADS * QUERIES; ++row) {
    CHECK(near(f.out[row * DIM], 3.0) && near(f.out[row * DIM + 1], 4.0)); /* the mean of the values */
    CHECK(near(f.lse[row], log(4.0)));
  }
  for (int i = 0; i < HEADS * KEYS; ++i) CHECK(near(f.total[i], QUERIES / 4.0));
  CHECK_OK(onepass_attention_backward(&f.tdout, &f.tq, &f.tk, &f.tv, &f.tout, &f.tlse, &f.gradients, NULL, &context));
  for (int i = 0; i < KEYS * DIM; ++i) CHECK(near(f.dv[i], HEADS * QUERIES / 4.0) && f.dk[i] == 0.0f);
}

static void test_options(void) {
  fixture f;
  onepass_attention_options options = ONEPASS_ATTENTION_OPTIONS_INIT;
  float bias[KEYS] = {0.0f, 100.0f, 0.0f, 0.0f};
  const int64_t bias_shape[] = {1, 1, 1, KEYS};
  onepass_tensor tbias = tensor(bias, ONEPASS_FLOAT32, 4, bias_shape);
  prepare(&f);
  options.flags = ONEPASS_CAUSAL | ONEPASS_TOP_LEFT; /* query 0 sees key 0 only */
  CHECK_OK(forward(&f, &options, NULL));
  CHECK(near(f.out[0], 0.0) && near(f.out[DIM], 1.0) && near(f.out[2 * DIM], 2.0));
  options.flags = ONEPASS_CAUSAL; /* query 0 sees keys 0 and 1 */
  CHECK_OK(forward(&f, &options, NULL));
  CHECK(near(f.out[0], 1.0) && near(f.out[2 * DIM], 3.0));
  options.flags = 0;
  options.window_left = 0;
  options.window_right = 0;
  CHECK_OK(forward(&f, &options, NULL));
  CHECK(near(f.out[0], 2.0) && near(f.out[DIM], 4.0));
  options = (onepass_attention_options)ONEPASS_ATTENTION_OPTIONS_INIT;
  options.bias = &tbias; /* key 1 takes all */
  CHECK_OK(forward(&f, &options, NULL));
  CHECK(near(f.out[0], 2.0) && near(f.out[1], 3.0));
  f.q[0] = 1.0f;
  options = (onepass_attention_options)ONEPASS_ATTENTION_OPTIONS_INIT;
  options.flags = ONEPASS_SOFTMAX_SCALE;
  options.softmax_scale = 0.0;
  CHECK_OK(forward(&f, &options, NULL));
  CHECK(near(f.out[0], 3.0));
}

static void test_varlen(void) {
  fixture f;
  const onepass_context context = reference();
  int32_t bounds_q[] = {0, 1, 3}, bounds_k[] = {0, 1, 4};
  const int64_t bounds_shape[] = {3}, ragged_q[] = {QUERIES, HEADS, DIM}, ragged_k[] = {KEYS, 1, DIM};
  const int64_t ragged_lse[] = {HEADS, QUERIES};
  onepass_tensor cu_q = tensor(bounds_q, ONEPASS_INT32, 1, bounds_shape);
  onepass_tensor cu_k = tensor(bounds_k, ONEPASS_INT32, 1, bounds_shape);
  onepass_varlen_shape shape = ONEPASS_VARLEN_SHAPE_INIT;
  prepare(&f);
  f.tq = tensor(f.q, ONEPASS_FLOAT32, 3, ragged_q);
  f.tout = tensor(f.out, ONEPASS_FLOAT32, 3, ragged_q);
  f.tdout = tensor(f.dout, ONEPASS_FLOAT32, 3, ragged_q);
  f.tdq = tensor(f.dq, ONEPASS_FLOAT32, 3, ragged_q);
  f.tk = tensor(f.k, ONEPASS_FLOAT32, 3, ragged_k);
  f.tv = tensor(f.v, ONEPASS_FLOAT32, 3, ragged_k);
  f.tdk = tensor(f.dk, ONEPASS_FLOAT32, 3, ragged_k);
  f.tdv = tensor(f.dv, ONEPASS_FLOAT32, 3, ragged_k);
  f.tlse = tensor(f.lse, ONEPASS_FLOAT32, 2, ragged_lse);
  f.outputs.total_attention = NULL;
  shape.cu_seqlens_q = &cu_q;
  shape.cu_seqlens_k = &cu_k;
  CHECK_OK(onepass_varlen_attention(&f.tq, &f.tk, &f.tv, &shape, &f.outputs, NULL, NULL));
  CHECK(near(f.out[0], 0.0) && near(f.out[HEADS * DIM], 4.0) && near(f.lse[0], 0.0) && near(f.lse[1], log(3.0)));
  CHECK_OK(onepass_varlen_attention_backward(&f.tdout, &f.tq, &f.tk, &f.tv, &shape, &f.tout, &f.tlse, &f.gradients,
                                             NULL, &context));
  CHECK(near(f.dv[0], 2.0) && near(f.dv[DIM], 4.0 / 3.0));
  bounds_k[1] = 5;
  CHECK_REFUSED(onepass_varlen_attention(&f.tq, &f.tk, &f.tv, &shape, &f.outputs, NULL, NULL), ONEPASS_INVALID_ARGUMENT,
                "varlen_attention: cu_seqlens_k: got 4 after 5", "non-decreasing");
  CHECK_REFUSED(onepass_varlen_attention(&f.tq, &f.tk, &f.tv, NULL, &f.outputs, NULL, NULL), ONEPASS_INVALID_ARGUMENT,
                "shape: got a null pointer", "a struct");
}

static void test_piecewise(void) {
  fixture f;
  float dq2[HEADS * QUERIES * DIM], dk2[KEYS * DIM];
  onepass_tensor tdq2 = tensor(dq2, ONEPASS_FLOAT32, 4, query_shape);
  onepass_tensor tdk2 = tensor(dk2, ONEPASS_FLOAT32, 4, key_shape);
  const onepass_context context = reference();
  prepare(&f);
  CHECK_OK(onepass_piecewise_attention(&f.tq, &f.tk, &f.tq, &f.tk, &f.tv, 2, &f.outputs, NULL, &context));
  CHECK(near(f.out[0], 3.0));
  f.gradients.dq2 = &tdq2;
  CHECK_REFUSED(onepass_piecewise_attention_backward(&f.tdout, &f.tq, &f.tk, &f.tq, &f.tk, &f.tv, 2, &f.tout, &f.tlse,
                                                     &f.gradients, NULL, &context),
                ONEPASS_INVALID_ARGUMENT, "dk2: got a null pointer", "a tensor");
  f.gradients.dk2 = &tdk2;
  CHECK_OK(onepass_piecewise_attention_backward(&f.tdout, &f.tq, &f.tk, &f.tq, &f.tk, &f.tv, 2, &f.tout, &f.tlse,
                                                &f.gradients, NULL, &context));
  CHECK(near(f.dv[0], HEADS * QUERIES / 4.0));
  CHECK_REFUSED(onepass_attention_backward(&f.tdout, &f.tq, &f.tk, &f.tv, &f.tout, &f.tlse, &f.gradients, NULL, NULL),
                ONEPASS_INVALID_ARGUMENT, "dq2: got a tensor", "none");
}

static void test_merge(void) {
  fixture f;
  float other[HEADS * QUERIES * DIM], other_lse[HEADS * QUERIES];
  onepass_tensor tother = tensor(other, ONEPASS_FLOAT32, 4, query_shape);
  onepass_tensor tother_lse = tensor(other_lse, ONEPASS_FLOAT32, 3, lse_shape);
  prepare(&f);
  for (int i = 0; i < HEADS * QUERIES * DIM; ++i) f.out[i] = 1.0f, other[i] = 3.0f;
  for (int i = 0; i < HEADS * QUERIES; ++i) f.lse[i] = 0.0f, other_lse[i] = (float)log(3.0);
  CHECK_OK(onepass_merge_states(&f.tout, &f.tlse, &tother, &tother_lse, &f.tout, &f.tlse, NULL));
  CHECK(near(f.out[0], 0.25 * 1.0 + 0.75 * 3.0) && near(f.lse[0], log(4.0)));
  CHECK_REFUSED(onepass_merge_states(&f.tout, &f.tlse, &tother, NULL, &f.tout, &f.tlse, NULL), ONEPASS_INVALID_ARGUMENT,
                "merge_states: lse_b: got a null pointer", "a tensor");
}

/* Beside the outputs and from the LSE: the same sums. */
static void test_total_attention(void) {
  fixture f;
  float again[HEADS * KEYS];
  onepass_tensor tagain = tensor(again, ONEPASS_FLOAT32, 3, total_shape);
  prepare(&f);
  CHECK_OK(onepass_attention(&f.tq, &f.tk, &f.tv, &f.outputs, NULL, NULL));
  CHECK_OK(onepass_total_attention(&f.tq, &f.tk, &f.tlse, &tagain, NULL, NULL));
  for (int i = 0; i < HEADS * KEYS; ++i) CHECK(f.total[i] == again[i]);
  CHECK_REFUSED(onepass_total_attention(&f.tq, &f.tk, NULL, &tagain, NULL, NULL), ONEPASS_INVALID_ARGUMENT,
                "total_attention: lse: got a null pointer", "a tensor");
}

/* Two appends to a cache of 4 tokens, attention over it with a third token brought along, and a cache that is full. */
static void test_cache(void) {
  fixture f;
  float k[KEYS * DIM] = {0}, v[KEYS * DIM] = {0}, token_k[DIM] = {0}, token_v[DIM] = {5, 7};
  int32_t seqlens[1] = {0};
  const int64_t token_shape[] = {1, 1, 1, DIM}, seqlens_shape[] = {1}, one_query[] = {1, HEADS, 1, DIM};
  const int64_t one_lse[] = {1, HEADS, 1};
  onepass_tensor tk = tensor(k, ONEPASS_FLOAT32, 4, key_shape), tv = tensor(v, ONEPASS_FLOAT32, 4, key_shape);
  onepass_tensor tk_new = tensor(token_k, ONEPASS_FLOAT32, 4, token_shape);
  onepass_tensor tv_new = tensor(token_v, ONEPASS_FLOAT32, 4, token_shape);
  onepass_tensor tseqlens = tensor(seqlens, ONEPASS_INT32, 1, seqlens_shape);
  onepass_kv_cache cache = ONEPASS_KV_CACHE_INIT;
  onepass_append_options append = ONEPASS_APPEND_OPTIONS_INIT;
  onepass_cached_options options = ONEPASS_CACHED_OPTIONS_INIT;
  prepare(&f);
  cache.k = &tk;
  cache.v = &tv;
  cache.seqlens = &tseqlens;
  CHECK_OK(onepass_append_kv(&cache, &tk_new, &tv_new, NULL, NULL));
  CHECK(seqlens[0] == 1 && v[0] == 5.0f && v[1] == 7.0f && v[2] == 0.0f);
  token_v[0] = 1.0f;
  append.keep_seqlens = 1;
  CHECK_OK(onepass_append_kv(&cache, &tk_new, &tv_new, &append, NULL));
  CHECK(seqlens[0] == 1 && v[2] == 1.0f);
  seqlens[0] = 2;
  f.tq = tensor(f.q, ONEPASS_FLOAT32, 4, one_query);
  f.tout = tensor(f.out, ONEPASS_FLOAT32, 4, one_query);
  f.tlse = tensor(f.lse, ONEPASS_FLOAT32, 3, one_lse);
  f.outputs.total_attention = NULL;
  CHECK_OK(onepass_cached_attention(&f.tq, &cache, &f.outputs, NULL, NULL));
  CHECK(near(f.out[0], 3.0) && near(f.out[1], 7.0) && near(f.lse[0], log(2.0)));
  token_v[0] = 3.0f;
  options.k_new = &tk_new;
  options.v_new = &tv_new;
  CHECK_OK(onepass_cached_attention(&f.tq, &cache, &f.outputs, &options, NULL));
  CHECK(seqlens[0] == 3 && near(f.out[DIM], 3.0) && near(f.lse[1], log(3.0)));
  CHECK_OK(onepass_append_kv(&cache, &tk_new, &tv_new, NULL, NULL));
  CHECK(onepass_append_kv(&cache, &tk_new, &tv_new, NULL, NULL) == ONEPASS_INVALID_ARGUMENT && seqlens[0] == 4);
  options.flags = ONEPASS_DETERMINISTIC; /* has no meaning here */
  CHECK_REFUSED(onepass_cached_attention(&f.tq, &cache, &f.outputs, &options, NULL), ONEPASS_INVALID_ARGUMENT,
                "cached_attention: options.flags: got 8", "the bits in");
  cache.seqlens = NULL;
  CHECK_REFUSED(onepass_append_kv(&cache, &tk_new, &tv_new, NULL, NULL), ONEPASS_INVALID_ARGUMENT,
                "append_kv: cache.seqlens: got a null pointer", "a tensor");
  CHECK_REFUSED(onepass_append_kv(NULL, &tk_new, &tv_new, NULL, NULL), ONEPASS_INVALID_ARGUMENT,
                "append_kv: cache: got a null pointer", "a struct");
}

/* Two sequences of at most four tokens in pages of two: they share a page until one of them writes to it. */
static void test_page_pool(void) {
  enum { SEQUENCES = 2, MAX_PAGES = 2, PAGES = 3, PAGE_SIZE = 2 };
  float k[PAGES * PAGE_SIZE * DIM] = {0}, v[PAGES * PAGE_SIZE * DIM] = {0};
  float token_k[SEQUENCES * DIM] = {1, 2, 3, 4}, token_v[SEQUENCES * DIM] = {5, 6, 7, 8};
  int32_t table[] = {-1, -1, -1, -1}, seqlens[] = {0, 0}, references[] = {0, 0, 0}, counts_new[] = {1, 0};
  const int64_t storage_shape[] = {PAGES, 1, PAGE_SIZE, DIM}, token_shape[] = {SEQUENCES, 1, 1, DIM};
  const int64_t table_shape[] = {SEQUENCES, MAX_PAGES}, sequences[] = {SEQUENCES}, pages[] = {PAGES};
  const int64_t one[] = {1, 0}, both[] = {1, 1}, many[] = {4, 0};
  int64_t free_pages = -1;
  size_t num_copies = 99;
  onepass_page_copy copies[SEQUENCES];
  onepass_tensor tk = tensor(k, ONEPASS_FLOAT32, 4, storage_shape), tv = tensor(v, ONEPASS_FLOAT32, 4, storage_shape);
  onepass_tensor tk_new = tensor(token_k, ONEPASS_FLOAT32, 4, token_shape);
  onepass_tensor tv_new = tensor(token_v, ONEPASS_FLOAT32, 4, token_shape);
  onepass_tensor ttable = tensor(table, ONEPASS_INT32, 2, table_shape);
  onepass_tensor tseqlens = tensor(seqlens, ONEPASS_INT32, 1, sequences);
  onepass_tensor treferences = tensor(references, ONEPASS_INT32, 1, pages);
  onepass_tensor tcounts = tensor(counts_new, ONEPASS_INT32, 1, sequences);
  onepass_kv_cache cache = ONEPASS_KV_CACHE_INIT;
  onepass_append_options append = ONEPASS_APPEND_OPTIONS_INIT;
  onepass_page_pool pool = ONEPASS_PAGE_POOL_INIT;
  pool.page_table = &ttable;
  pool.seqlens = &tseqlens;
  pool.reference_counts = &treferences;
  pool.page_size = PAGE_SIZE;
  cache.k = &tk;
  cache.v = &tv;
  cache.page_table = &ttable;
  cache.seqlens = &tseqlens;
  append.seqlens = &tcounts;

  CHECK_OK(onepass_page_pool_reserve(&pool, one, copies, &num_copies));
  CHECK(num_copies == 0 && table[0] == 0 && table[1] == -1 && references[0] == 1);
  CHECK_OK(onepass_append_kv(&cache, &tk_new, &tv_new, &append, NULL));
  CHECK(seqlens[0] == 1 && seqlens[1] == 0 && k[0] == 1.0f && v[1] == 6.0f);
  CHECK_OK(onepass_page_pool_fork(&pool, 0, 1, ONEPASS_WHOLE_SEQUENCE));
  CHECK(seqlens[1] == 1 && table[MAX_PAGES] == 0 && references[0] == 2);
  CHECK_OK(onepass_page_pool_reserve(&pool, both, copies, &num_copies)); /* the first to write gets a page of its own */
  CHECK(num_copies == 1 && copies[0].source == 0 && copies[0].target == 1 && table[0] == 1 && table[MAX_PAGES] == 0);
  CHECK_OK(onepass_copy_pages(&cache, copies, num_copies));
  counts_new[1] = 1;
  CHECK_OK(onepass_append_kv(&cache, &tk_new, &tv_new, &append, NULL));
  CHECK(k[PAGE_SIZE * DIM] == 1.0f && k[PAGE_SIZE * DIM + DIM] == 1.0f); /* page 1: the copy, then the new token */
  CHECK(k[0] == 1.0f && k[DIM] == 3.0f && seqlens[0] == 2 && seqlens[1] == 2);
  CHECK_OK(onepass_page_pool_free_pages(&pool, &free_pages));
  CHECK(free_pages == 1);
  CHECK_OK(onepass_page_pool_truncate(&pool, 1, 0));
  CHECK_OK(onepass_page_pool_free_pages(&pool, &free_pages));
  CHECK(free_pages == 2 && seqlens[1] == 0 && table[MAX_PAGES] == -1);

  CHECK_REFUSED(onepass_page_pool_reserve(&pool, many, copies, &num_copies), ONEPASS_INVALID_ARGUMENT,
                "page_pool.reserve: counts: got 4 new tokens behind 2", "capacity of 4");
  CHECK_REFUSED(onepass_page_pool_reserve(&pool, one, NULL, &num_copies), ONEPASS_INVALID_ARGUMENT,
                "page_pool.reserve: copies: got a null pointer", "room for one of each sequence");
  CHECK_REFUSED(onepass_page_pool_fork(&pool, 0, 1, 3), ONEPASS_INVALID_ARGUMENT, "page_pool.fork: length: got 3",
                "0 to the 2 tokens");
  CHECK_REFUSED(onepass_page_pool_truncate(&pool, 2, 0), ONEPASS_INVALID_ARGUMENT,
                "page_pool.truncate: sequence: got 2", "0 to 1");
  CHECK_REFUSED(onepass_page_pool_free_pages(&pool, NULL), ONEPASS_INVALID_ARGUMENT, "count: got a null pointer",
                "where to write");
  CHECK_REFUSED(onepass_page_pool_free_pages(NULL, &free_pages), ONEPASS_INVALID_ARGUMENT, "pool: got a null pointer",
                "a struct");
  copies[0].target = PAGES;
  CHECK_REFUSED(onepass_copy_pages(&cache, copies, 1), ONEPASS_INVALID_ARGUMENT, "copy_pages: copies: got page 3",
                "0 to 2");
  CHECK_REFUSED(onepass_copy_pages(&cache, NULL, 1), ONEPASS_INVALID_ARGUMENT, "copies: got a null pointer",
                "1 copies");
  table[0] = 7;
  CHECK_REFUSED(onepass_page_pool_truncate(&pool, 0, 0), ONEPASS_INVALID_ARGUMENT,
                "page_table: got page 7 for sequence 0", "a page of the pool");
  table[0] = 2; /* nobody's */
  CHECK_REFUSED(onepass_page_pool_fork(&pool, 0, 1, 1), ONEPASS_INVALID_ARGUMENT, "which has no owner", "in use");
  table[0] = -1;
  CHECK_REFUSED(onepass_page_pool_fork(&pool, 0, 1, 1), ONEPASS_INVALID_ARGUMENT, "no page for token 0 of the source",
                "pages for all its tokens");
  seqlens[0] = 5;
  CHECK_REFUSED(onepass_page_pool_free_pages(&pool, &free_pages), ONEPASS_INVALID_ARGUMENT,
                "page_pool: seqlens: got 5 for sequence 0", "capacity of 4");
  pool.page_size = 0;
  CHECK_REFUSED(onepass_page_pool_truncate(&pool, 0, 0), ONEPASS_INVALID_ARGUMENT, "page_size: got 0", "1 to");
}

static void test_refusals(void) {
  fixture f;
  onepass_attention_options options = ONEPASS_ATTENTION_OPTIONS_INIT;
  onepass_context context = ONEPASS_CONTEXT_INIT;
  prepare(&f);
  CHECK_REFUSED(onepass_attention(NULL, &f.tk, &f.tv, &f.outputs, NULL, NULL), ONEPASS_INVALID_ARGUMENT,
                "attention: q: got a null pointer", "need a tensor");
  CHECK_REFUSED(onepass_attention(&f.tq, &f.tk, &f.tv, NULL, NULL, NULL), ONEPASS_INVALID_ARGUMENT,
                "outputs: got a null pointer", "a struct");
  f.tk.struct_size = 8;
  CHECK_REFUSED(forward(&f, NULL, NULL), ONEPASS_INVALID_ARGUMENT, "k.struct_size: got 8", onepass_version());
  prepare(&f);
  f.tk.reserved = 1;
  CHECK_REFUSED(forward(&f, NULL, NULL), ONEPASS_INVALID_ARGUMENT, "k.reserved: got 1", "need 0");
  prepare(&f);
  f.tk.dtype = 256 + ONEPASS_FLOAT32; /* would be float32 in one byte */
  CHECK_REFUSED(forward(&f, NULL, NULL), ONEPASS_INVALID_TYPE, "dtype 257", "a known one");
  f.tk.dtype = 99;
  CHECK_REFUSED(forward(&f, NULL, NULL), ONEPASS_INVALID_TYPE, "unknown dtype 99", "a known dtype");
  prepare(&f);
  f.tv.device_type = -1;
  CHECK_REFUSED(forward(&f, NULL, NULL), ONEPASS_INVALID_TYPE, "device_type -1", "a known one");
  prepare(&f);
  f.outputs.out = NULL;
  CHECK_REFUSED(forward(&f, NULL, NULL), ONEPASS_INVALID_ARGUMENT, "out: got a null pointer", "a tensor");
  prepare(&f);
  f.outputs.struct_size = 0;
  CHECK_REFUSED(forward(&f, NULL, NULL), ONEPASS_INVALID_ARGUMENT, "outputs.struct_size: got 0", "the size in version");
  prepare(&f);
  options.flags = UINT64_C(1) << 40;
  CHECK_REFUSED(forward(&f, &options, NULL), ONEPASS_INVALID_ARGUMENT, "options.flags", "the bits in");
  options = (onepass_attention_options)ONEPASS_ATTENTION_OPTIONS_INIT;
  options.struct_size += 8;
  CHECK_REFUSED(forward(&f, &options, NULL), ONEPASS_INVALID_ARGUMENT, "options.struct_size", "the size in version");
  options = (onepass_attention_options)ONEPASS_ATTENTION_OPTIONS_INIT;
  options.flags = ONEPASS_SOFTMAX_SCALE;
  options.softmax_scale = NAN;
  CHECK_REFUSED(forward(&f, &options, NULL), ONEPASS_INVALID_ARGUMENT, "softmax_scale: got nan", "finite");
  options = (onepass_attention_options)ONEPASS_ATTENTION_OPTIONS_INIT;
  options.window_left = -2;
  CHECK_REFUSED(forward(&f, &options, NULL), ONEPASS_INVALID_ARGUMENT, "window.left: got -2", "0 or more");
  context.struct_size = 1;
  CHECK_REFUSED(forward(&f, NULL, &context), ONEPASS_INVALID_ARGUMENT, "context.struct_size: got 1",
                "the size in version");
  context = (onepass_context)ONEPASS_CONTEXT_INIT;
  context.backend = "abacus";
  CHECK_REFUSED(forward(&f, NULL, &context), ONEPASS_UNSUPPORTED, "abacus", "no such backend");
  for (int i = 0; i < HEADS * QUERIES * DIM; ++i) CHECK(f.out[i] == -77.0f); /* nothing was ever written */
}

/* Callbacks: memory that runs out at will, and an executor that runs backwards. */
typedef struct {
  int live, allocations, fail_at, runs, forget;
} counters;

static void* allocate(void* user, size_t bytes, onepass_device_type device_type, int32_t device_index, void* stream) {
  counters* c = user;
  (void)stream;
  if (device_type != ONEPASS_CPU || device_index != 0 || ++c->allocations == c->fail_at) return NULL;
  ++c->live;
  return aligned_alloc(256, (bytes + 255) / 256 * 256);
}

static void deallocate(void* user, void* block, size_t bytes, onepass_device_type device_type, int32_t device_index,
                       void* stream) {
  (void)bytes, (void)device_type, (void)device_index, (void)stream;
  --((counters*)user)->live;
  free(block);
}

static void run_backwards(void* user, int64_t count, onepass_task task, void* task_data) {
  counters* c = user;
  ++c->runs;
  for (int64_t index = count - 1; index >= c->forget; --index) task(task_data, index);
}

static void test_callbacks(void) {
  fixture f;
  counters c = {0, 0, 0, 0, 0};
  onepass_context context = ONEPASS_CONTEXT_INIT;
  context.backend = "reference";
  context.user = &c;
  context.allocate = allocate;
  prepare(&f);
  CHECK_REFUSED(forward(&f, NULL, &context), ONEPASS_INVALID_ARGUMENT, "context.allocate", "both or none");
  context.deallocate = deallocate;
  context.run = run_backwards;
  CHECK_REFUSED(forward(&f, NULL, &context), ONEPASS_INVALID_ARGUMENT, "context.concurrency: got 0", "at least 1");
  context.concurrency = 1;
  CHECK_OK(forward(&f, NULL, &context));
  CHECK(near(f.out[0], 3.0) && c.allocations > 0 && c.live == 0 && c.runs > 0);
  c.fail_at = c.allocations + 1;
  CHECK_REFUSED(forward(&f, NULL, &context), ONEPASS_OUT_OF_MEMORY, "allocator: got null", "bytes");
  CHECK(c.live == 0);
  c.forget = 1; /* an executor that leaves a task out does not go unnoticed */
  CHECK_REFUSED(forward(&f, NULL, &context), ONEPASS_INTERNAL, "run: got 1 calls", "need 2");
  CHECK(c.live == 0);
}

static void* other_thread(void* unused) {
  (void)unused;
  CHECK(strcmp(onepass_last_error(), "") == 0);
  onepass_alibi_slope(0, -1, 0, NULL);
  return NULL;
}

static void test_last_error_is_of_the_thread(void) {
  double slope = 0.0;
  pthread_t thread;
  CHECK_REFUSED(onepass_alibi_slope(9, 8, 0, &slope), ONEPASS_INVALID_ARGUMENT, "alibi_slope: head: got 9", "0 to 7");
  CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0 && pthread_join(thread, NULL) == 0);
  CHECK(strstr(onepass_last_error(), "got 9") != NULL);
  CHECK_OK(onepass_alibi_slope(0, 8, 0, &slope));
  CHECK(slope == 0.5);
  CHECK(strstr(onepass_last_error(), "got 9") != NULL); /* success leaves it */
}

static void test_info(void) {
  char text[4096], few[8];
  size_t length = 0;
  CHECK_OK(onepass_info(NULL, 0, &length));
  CHECK(length > 0 && length < sizeof(text));
  CHECK_OK(onepass_info(text, sizeof(text), NULL));
  CHECK(strlen(text) == length && strstr(text, onepass_version()) != NULL);
  CHECK_OK(onepass_info(few, sizeof(few), &length));
  CHECK(strncmp(few, text, 7) == 0 && few[7] == '\0');
  CHECK_REFUSED(onepass_info(NULL, 5, NULL), ONEPASS_INVALID_ARGUMENT, "text", "5 bytes");
  onepass_set_num_threads(3);
  CHECK(onepass_num_threads() == 3);
  onepass_set_num_threads(0);
  CHECK(onepass_num_threads() >= 1);
}

int main(void) {
  test_attention();
  test_options();
  test_varlen();
  test_piecewise();
  test_merge();
  test_total_attention();
  test_cache();
  test_page_pool();
  test_refusals();
  test_callbacks();
  test_last_error_is_of_the_thread();
  test_info();
  if (failures == 0) printf("all passed\n");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

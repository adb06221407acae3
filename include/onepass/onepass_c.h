/* onepass/onepass_c.h: the C interface. It mirrors the C++ one (attention.h, piecewise.h, kv_cache.h, execution.h),
 * which explains what each argument means.
 *
 * Every function that can fail returns an onepass_status; onepass_last_error() then says why. Nothing is written when a
 * call is refused, and nothing throws, prints or aborts. Every struct begins with its size: start from its _INIT macro.
 * A null pointer to a tensor or to a struct of options means "not given". */
#ifndef ONEPASS_C_H
#define ONEPASS_C_H

#include <stddef.h>
#include <stdint.h>

#include "onepass/export.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t onepass_status;
enum {
  ONEPASS_OK = 0,
  ONEPASS_INVALID_ARGUMENT = 1, /* a value, shape, stride or combination that no backend could accept */
  ONEPASS_INVALID_TYPE = 2,     /* a dtype or device that the operation does not take */
  ONEPASS_UNSUPPORTED = 3,      /* a valid request that no built and present backend serves */
  ONEPASS_OUT_OF_MEMORY = 4,
  ONEPASS_DEVICE_ERROR = 5, /* a CUDA call failed */
  ONEPASS_INTERNAL = 6      /* a broken invariant of the library, or a foreign exception */
};

typedef int32_t onepass_dtype;
enum {
  ONEPASS_FLOAT64 = 0,
  ONEPASS_FLOAT32 = 1,
  ONEPASS_FLOAT16 = 2,
  ONEPASS_BFLOAT16 = 3,
  ONEPASS_INT8 = 4,
  ONEPASS_FLOAT8_E4M3 = 5,
  ONEPASS_FLOAT8_E5M2 = 6,
  ONEPASS_INT32 = 7,
  ONEPASS_INT64 = 8
};

typedef int32_t onepass_device_type;
enum { ONEPASS_CPU = 0, ONEPASS_CUDA = 1 };

enum { ONEPASS_MAX_RANK = 5 };

/* A non-owning view; strides count elements. */
typedef struct onepass_tensor {
  uint32_t struct_size;
  onepass_dtype dtype;
  void* data;
  onepass_device_type device_type;
  int32_t device_index;
  int32_t rank;
  int32_t reserved; /* 0 */
  int64_t shape[ONEPASS_MAX_RANK];
  int64_t strides[ONEPASS_MAX_RANK];
} onepass_tensor;
#define ONEPASS_TENSOR_INIT                                                         \
  {                                                                                 \
    sizeof(onepass_tensor), ONEPASS_FLOAT32, NULL, ONEPASS_CPU, 0, 0, 0, {0}, { 0 } \
  }

/* Bits of onepass_attention_options.flags. */
#define ONEPASS_CAUSAL UINT64_C(1)
#define ONEPASS_TOP_LEFT UINT64_C(2)              /* PyTorch's alignment of the diagonal, instead of bottom-right */
#define ONEPASS_ALIBI_ZERO_FOR_FUTURE UINT64_C(4) /* future keys get 0 instead of −slope·distance */
#define ONEPASS_DETERMINISTIC UINT64_C(8)
#define ONEPASS_SOFTMAX_SCALE UINT64_C(16) /* softmax_scale counts; without it the scale is 1/sqrt(head_dim) */

#define ONEPASS_UNBOUNDED INT64_C(-1) /* a window's side without a limit */

typedef struct onepass_attention_options {
  uint32_t struct_size;
  uint32_t reserved; /* 0 */
  uint64_t flags;
  double softmax_scale;
  int64_t window_left, window_right; /* 0 or more, or ONEPASS_UNBOUNDED */
  double softcap;                    /* 0: none */
  const onepass_tensor* alibi_slopes;
  const onepass_tensor* bias;
  const onepass_tensor* sinks;
  const onepass_tensor* key_begin;
  const onepass_tensor* key_end;
  double dropout_p;
  uint64_t dropout_seed, dropout_offset;
} onepass_attention_options;
#define ONEPASS_ATTENTION_OPTIONS_INIT                                                                               \
  {                                                                                                                  \
    sizeof(onepass_attention_options), 0, 0, 0.0, ONEPASS_UNBOUNDED, ONEPASS_UNBOUNDED, 0.0, NULL, NULL, NULL, NULL, \
        NULL, 0.0, 0, 0                                                                                              \
  }

typedef struct onepass_attention_outputs {
  uint32_t struct_size;
  uint32_t reserved; /* 0 */
  const onepass_tensor* out;
  const onepass_tensor* lse;             /* optional */
  const onepass_tensor* total_attention; /* optional */
} onepass_attention_outputs;
#define ONEPASS_ATTENTION_OUTPUTS_INIT \
  { sizeof(onepass_attention_outputs), 0, NULL, NULL, NULL }

typedef struct onepass_attention_gradients {
  uint32_t struct_size;
  uint32_t reserved; /* 0 */
  const onepass_tensor* dq;
  const onepass_tensor* dk;
  const onepass_tensor* dv;
  const onepass_tensor* dbias;  /* optional */
  const onepass_tensor* dsinks; /* optional */
  const onepass_tensor* dq2;    /* of the second pair: piecewise attention only */
  const onepass_tensor* dk2;
} onepass_attention_gradients;
#define ONEPASS_ATTENTION_GRADIENTS_INIT \
  { sizeof(onepass_attention_gradients), 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL }

typedef struct onepass_varlen_shape {
  uint32_t struct_size;
  uint32_t reserved; /* 0 */
  const onepass_tensor* cu_seqlens_q;
  const onepass_tensor* cu_seqlens_k;
  int64_t max_seqlen_q; /* 0: the total */
  int64_t max_seqlen_k;
} onepass_varlen_shape;
#define ONEPASS_VARLEN_SHAPE_INIT \
  { sizeof(onepass_varlen_shape), 0, NULL, NULL, 0, 0 }

/* What shares one scale of a quantized cache; see kv_cache.h. */
enum {
  ONEPASS_SCALE_NONE = 0,
  ONEPASS_SCALE_TENSOR = 1,
  ONEPASS_SCALE_TOKEN = 2,
  ONEPASS_SCALE_HEAD = 3,
  ONEPASS_SCALE_GROUP = 4
};

typedef struct onepass_kv_cache {
  uint32_t struct_size;
  uint32_t reserved; /* 0 */
  const onepass_tensor* k;
  const onepass_tensor* v;
  const onepass_tensor* page_table; /* only of a paged cache */
  const onepass_tensor* seqlens;
  const onepass_tensor* k_scale;
  const onepass_tensor* v_scale;
  int32_t scale_granularity;
  int32_t reserved2; /* 0 */
  int64_t scale_group;
  const onepass_tensor* first_key;
  const onepass_tensor* batch_index;
} onepass_kv_cache;
#define ONEPASS_KV_CACHE_INIT \
  { sizeof(onepass_kv_cache), 0, NULL, NULL, NULL, NULL, NULL, NULL, ONEPASS_SCALE_NONE, 0, 0, NULL, NULL }

typedef struct onepass_rotary {
  uint32_t struct_size;
  int32_t interleaved; /* pairs are channels (2i, 2i + 1); else (i, i + pairs) */
  const onepass_tensor* cos;
  const onepass_tensor* sin;
} onepass_rotary;
#define ONEPASS_ROTARY_INIT \
  { sizeof(onepass_rotary), 0, NULL, NULL }

typedef struct onepass_append_options {
  uint32_t struct_size;
  int32_t keep_seqlens; /* not 0: the caller adds the new tokens to the cache's seqlens */
  const onepass_tensor* cu_seqlens;
  const onepass_tensor* seqlens;
  const onepass_rotary* rotary;
} onepass_append_options;
#define ONEPASS_APPEND_OPTIONS_INIT \
  { sizeof(onepass_append_options), 0, NULL, NULL, NULL }

/* Which page belongs to whom: PagePool of kv_cache.h. Contiguous int32 tensors on the CPU. */
typedef struct onepass_page_pool {
  uint32_t struct_size;
  uint32_t reserved;                      /* 0 */
  const onepass_tensor* page_table;       /* (sequences, max_pages); in an empty pool all -1 */
  const onepass_tensor* seqlens;          /* (sequences); 0 */
  const onepass_tensor* reference_counts; /* (num_pages); 0 */
  int64_t page_size;
} onepass_page_pool;
#define ONEPASS_PAGE_POOL_INIT \
  { sizeof(onepass_page_pool), 0, NULL, NULL, NULL, 0 }

typedef struct onepass_page_copy {
  int32_t source, target;
} onepass_page_copy;

#define ONEPASS_WHOLE_SEQUENCE INT64_C(-1)

typedef struct onepass_cached_options {
  uint32_t struct_size;
  int32_t keep_seqlens;
  uint64_t flags; /* ONEPASS_CAUSAL (set by INIT), ONEPASS_ALIBI_ZERO_FOR_FUTURE, ONEPASS_SOFTMAX_SCALE */
  double softmax_scale;
  int64_t window_left, window_right;
  double softcap;
  const onepass_tensor* alibi_slopes;
  const onepass_tensor* sinks;
  const onepass_tensor* cu_seqlens_q;
  int64_t max_seqlen_q;
  const onepass_tensor* k_new;
  const onepass_tensor* v_new;
  const onepass_rotary* rotary;
  int64_t num_splits;
  double prob_threshold;
} onepass_cached_options;
#define ONEPASS_CACHED_OPTIONS_INIT                                                                                \
  {                                                                                                                \
    sizeof(onepass_cached_options), 0, ONEPASS_CAUSAL, 0.0, ONEPASS_UNBOUNDED, ONEPASS_UNBOUNDED, 0.0, NULL, NULL, \
        NULL, 0, NULL, NULL, NULL, 0, 0.0                                                                          \
  }

/* Memory for workspace, aligned to at least 256 bytes; NULL when there is none. */
typedef void* (*onepass_allocate)(void* user, size_t bytes, onepass_device_type device_type, int32_t device_index,
                                  void* stream);
typedef void (*onepass_deallocate)(void* user, void* block, size_t bytes, onepass_device_type device_type,
                                   int32_t device_index, void* stream);

/* Calls task(task_data, index) for every index in [0, count), on any threads, and returns when all are done. */
typedef void (*onepass_task)(void* task_data, int64_t index);
typedef void (*onepass_run)(void* user, int64_t count, onepass_task task, void* task_data);

/* What a call may use. A null pointer to it, or a null callback, means the library's own. */
typedef struct onepass_context {
  uint32_t struct_size;
  int32_t concurrency;       /* threads that `run` uses at once, at least 1 when `run` is given */
  void* stream;              /* cudaStream_t of the tensors' device; ignored on the CPU */
  const char* backend;       /* use no other than this one */
  void* user;                /* passed to the callbacks */
  onepass_allocate allocate; /* given together with deallocate */
  onepass_deallocate deallocate;
  onepass_run run;
} onepass_context;
#define ONEPASS_CONTEXT_INIT \
  { sizeof(onepass_context), 0, NULL, NULL, NULL, NULL, NULL, NULL }

ONEPASS_API onepass_status onepass_attention(const onepass_tensor* q, const onepass_tensor* k, const onepass_tensor* v,
                                             const onepass_attention_outputs* outputs,
                                             const onepass_attention_options* options, const onepass_context* context);

ONEPASS_API onepass_status onepass_attention_backward(const onepass_tensor* dout, const onepass_tensor* q,
                                                      const onepass_tensor* k, const onepass_tensor* v,
                                                      const onepass_tensor* out, const onepass_tensor* lse,
                                                      const onepass_attention_gradients* gradients,
                                                      const onepass_attention_options* options,
                                                      const onepass_context* context);

ONEPASS_API onepass_status onepass_varlen_attention(const onepass_tensor* q, const onepass_tensor* k,
                                                    const onepass_tensor* v, const onepass_varlen_shape* shape,
                                                    const onepass_attention_outputs* outputs,
                                                    const onepass_attention_options* options,
                                                    const onepass_context* context);

ONEPASS_API onepass_status onepass_varlen_attention_backward(const onepass_tensor* dout, const onepass_tensor* q,
                                                             const onepass_tensor* k, const onepass_tensor* v,
                                                             const onepass_varlen_shape* shape,
                                                             const onepass_tensor* out, const onepass_tensor* lse,
                                                             const onepass_attention_gradients* gradients,
                                                             const onepass_attention_options* options,
                                                             const onepass_context* context);

ONEPASS_API onepass_status onepass_piecewise_attention(const onepass_tensor* q1, const onepass_tensor* k1,
                                                       const onepass_tensor* q2, const onepass_tensor* k2,
                                                       const onepass_tensor* v, int64_t dist_threshold,
                                                       const onepass_attention_outputs* outputs,
                                                       const onepass_attention_options* options,
                                                       const onepass_context* context);

ONEPASS_API onepass_status onepass_piecewise_attention_backward(
    const onepass_tensor* dout, const onepass_tensor* q1, const onepass_tensor* k1, const onepass_tensor* q2,
    const onepass_tensor* k2, const onepass_tensor* v, int64_t dist_threshold, const onepass_tensor* out,
    const onepass_tensor* lse, const onepass_attention_gradients* gradients, const onepass_attention_options* options,
    const onepass_context* context);

ONEPASS_API onepass_status onepass_total_attention(const onepass_tensor* q, const onepass_tensor* k,
                                                   const onepass_tensor* lse, const onepass_tensor* total,
                                                   const onepass_attention_options* options,
                                                   const onepass_context* context);

ONEPASS_API onepass_status onepass_merge_states(const onepass_tensor* out_a, const onepass_tensor* lse_a,
                                                const onepass_tensor* out_b, const onepass_tensor* lse_b,
                                                const onepass_tensor* out, const onepass_tensor* lse,
                                                const onepass_context* context);

ONEPASS_API onepass_status onepass_append_kv(const onepass_kv_cache* cache, const onepass_tensor* k_new,
                                             const onepass_tensor* v_new, const onepass_append_options* options,
                                             const onepass_context* context);

ONEPASS_API onepass_status onepass_cached_attention(const onepass_tensor* q, const onepass_kv_cache* cache,
                                                    const onepass_attention_outputs* outputs,
                                                    const onepass_cached_options* options,
                                                    const onepass_context* context);

/* Makes room for counts[b] more tokens of each of the pool's sequences: all or, with an error and no change, nothing.
 * Writes the pages whose content must then be copied (onepass_copy_pages) before tokens are stored. `copies` has room
 * for one for each sequence, as many as there can be. */
ONEPASS_API onepass_status onepass_page_pool_reserve(const onepass_page_pool* pool, const int64_t* counts,
                                                     onepass_page_copy* copies, size_t* num_copies);

/* Keeps the first `length` tokens of a sequence; 0 frees it. */
ONEPASS_API onepass_status onepass_page_pool_truncate(const onepass_page_pool* pool, int64_t sequence, int64_t length);

/* `target`, freed first, shares the pages of the first `length` tokens of `source`, or of ONEPASS_WHOLE_SEQUENCE. */
ONEPASS_API onepass_status onepass_page_pool_fork(const onepass_page_pool* pool, int64_t source, int64_t target,
                                                  int64_t length);

ONEPASS_API onepass_status onepass_page_pool_free_pages(const onepass_page_pool* pool, int64_t* count);

ONEPASS_API onepass_status onepass_copy_pages(const onepass_kv_cache* cache, const onepass_page_copy* copies,
                                              size_t num_copies);

ONEPASS_API onepass_status onepass_alibi_slope(int64_t head, int64_t num_heads, int32_t geometric, double* slope);

ONEPASS_API const char* onepass_version(void);

/* Writes at most `capacity` bytes of text, its end included, and its full length to *length (which may be null). */
ONEPASS_API onepass_status onepass_info(char* text, size_t capacity, size_t* length);

/* The message of this thread's last call that failed; "" when none has. Valid until its next failing call. */
ONEPASS_API const char* onepass_last_error(void);

/* Threads of the library's own pool; 0 or less: as many as the hardware has. */
ONEPASS_API void onepass_set_num_threads(int32_t count);
ONEPASS_API int32_t onepass_num_threads(void);

#ifdef __cplusplus
}
#endif

#endif

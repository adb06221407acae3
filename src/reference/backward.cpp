// reference/backward.cpp: with P = exp(S − lse), F the dropout factors, dP = dO·Vᵀ and delta = rowsum(dO∘O),
//   dV = (P∘F)ᵀ·dO    dS = P∘(F∘dP − delta)    dQ = scale·(dS∘S')·K    dK = scale·(dS∘S')ᵀ·Q
// where S' is the derivative of softcap; dbias sums dS over the broadcast dimensions, and a sink's weight
// exp(sink − lse) multiplies no value, so that dsink = −Σ exp(sink − lse)·delta.
//
// out and lse are the caller's: for a part of the keys with the lse of all of them (context parallelism) these are the
// gradients of the whole.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "reference/head.h"
#include "reference/reference.h"

namespace onepass::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The second pair of piecewise attention and where its gradients go.
struct Far {
  FarPair pair;
  Operand dq, dk;
};
const FarPair* pair_of(const Far* far) { return far == nullptr ? nullptr : &far->pair; }

template <class T>
double dot(const T* a, const T* b, std::int64_t count) {
  double sum = 0.0;
  for (std::int64_t d = 0; d < count; ++d) sum += to_double(a[d]) * to_double(b[d]);
  return sum;
}

// What the gradients need of one query row.
template <class T>
struct Row {
  const BackwardProblem& problem;
  const Head<T>& head;
  std::int64_t i;
  const T* dout;
  double lse, delta;

  Row(const BackwardProblem& problem_, const Head<T>& head_, std::int64_t i_)
      : problem(problem_),
        head(head_),
        i(i_),
        dout(head_.query_row(problem_.dout, i_)),
        lse(head_.query_statistic(problem_.forward.lse, i_)),
        delta(empty() ? 0.0 : dot<T>(dout, head_.query_row(problem_.forward.out, i_), problem_.forward.head_dim_v)) {}

  bool empty() const { return lse == -kInfinity; }
  KeyRange keys() const { return empty() ? KeyRange{0, 0} : head.visible(i); }

  struct Pair {
    double weight;    // of the value row, after dropout
    double dscore;    // d loss / d logit
    double dproduct;  // d loss / d (softmax_scale·q·k)
  };
  Pair pair(std::int64_t j) const {
    const Score s = head.score(i, j);
    const double p = std::exp(s.value - lse), factor = head.dropout_factor(i, j);
    const double dweight = factor * dot<T>(dout, head.key_row(problem.forward.v, j), problem.forward.head_dim_v);
    const double dscore = p * (dweight - delta);
    return {p * factor, dscore, dscore * s.slope};
  }
  double sink_gradient() const { return empty() ? 0.0 : -std::exp(head.sink() - lse) * delta; }
};

// Adds factor·row to sums.
template <class T>
void accumulate(double* sums, double factor, const T* row, std::int64_t count) {
  for (std::int64_t d = 0; d < count; ++d) sums[d] += factor * to_double(row[d]);
}

template <class T>
void write_row(T* row, const double* sums, double factor, std::int64_t count) {
  for (std::int64_t d = 0; d < count; ++d) row[d] = round_to<T>(factor * sums[d]);
}

// Doubles that backward_group needs.
std::int64_t group_scratch_size(const Problem& f, std::int64_t pairs) {
  return f.seqlen_k * f.head_dim_v + pairs * (f.seqlen_k + 1) * f.head_dim;
}

// Sums of one pair of query and key operands: a row of dQ, and dK of every key of the group's key head.
struct PairSums {
  double* dq;  // (head_dim)
  double* dk;  // (seqlen_k, head_dim)
  Operand dq_out, dk_out;
};

// dQ of the query heads that share one key head, and its dK and dV. far is null but for piecewise attention.
template <class T>
void backward_group(const BackwardProblem& problem, const Far* far, std::int64_t batch, std::int64_t head_kv,
                    double* scratch) {
  const Problem& f = problem.forward;
  const double scale = std::is_same_v<T, double> ? f.softmax_scale_f64 : double{f.softmax_scale};
  const std::int64_t first_head = head_kv * f.group_size(), pairs = far == nullptr ? 1 : 2;
  const Head<T> first(f, pair_of(far), batch, first_head);
  const std::int64_t seqlen_k = first.sequence().seqlen_k;

  std::fill_n(scratch, group_scratch_size(f, pairs), 0.0);
  double* const dv = scratch;
  PairSums sums[2];  // near, far
  for (std::int64_t pair = 0; pair < pairs; ++pair) {
    double* const dk = dv + seqlen_k * f.head_dim_v + pair * (seqlen_k + 1) * f.head_dim;
    sums[pair] = {dk + seqlen_k * f.head_dim, dk, pair == 0 ? problem.dq : far->dq, pair == 0 ? problem.dk : far->dk};
  }
  for (std::int64_t h = first_head; h < first_head + f.group_size(); ++h) {
    const Head<T> head(f, pair_of(far), batch, h);
    for (std::int64_t i = 0; i < head.sequence().seqlen_q; ++i) {
      const Row<T> row(problem, head, i);
      for (std::int64_t pair = 0; pair < pairs; ++pair) std::fill_n(sums[pair].dq, f.head_dim, 0.0);
      const KeyRange keys = row.keys();
      for (std::int64_t j = keys.begin; j < keys.end; ++j) {
        const auto [weight, dscore, dproduct] = row.pair(j);
        const bool is_far = head.is_far(i, j);
        const PairSums& pair = sums[is_far];
        accumulate(pair.dq, dproduct, head.scored_key(j, is_far), f.head_dim);
        accumulate(pair.dk + j * f.head_dim, dproduct, head.scored_query(i, is_far), f.head_dim);
        accumulate(dv + j * f.head_dim_v, weight, row.dout, f.head_dim_v);
      }
      for (std::int64_t pair = 0; pair < pairs; ++pair) {
        write_row(head.query_row(sums[pair].dq_out, i), sums[pair].dq, scale, f.head_dim);
      }
    }
  }
  for (std::int64_t j = 0; j < seqlen_k; ++j) {
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      write_row(first.key_row(sums[pair].dk_out, j), sums[pair].dk + j * f.head_dim, scale, f.head_dim);
    }
    write_row(first.key_row(problem.dv, j), dv + j * f.head_dim_v, 1.0, f.head_dim_v);
  }
}

// Indices of one dimension that share element `index` of dbias: itself, or all when the dimension is broadcast.
KeyRange sharing(std::int64_t stride, std::int64_t index, std::int64_t size) {
  return stride == 0 ? KeyRange{0, size} : KeyRange{index, index + 1};
}
std::int64_t stored_size(std::int64_t stride, std::int64_t size) { return stride == 0 ? 1 : size; }

// One (batch, head) plane of dbias, as stored.
template <class T>
void bias_gradient(const BackwardProblem& problem, const FarPair* far, std::int64_t stored_batch,
                   std::int64_t stored_head, double* sums) {
  const Problem& f = problem.forward;
  const BiasOperand& dbias = problem.dbias;
  const std::int64_t rows = stored_size(dbias.query_stride, f.seqlen_q);
  const std::int64_t columns = stored_size(dbias.key_stride, f.seqlen_k);
  std::fill_n(sums, rows * columns, 0.0);
  const KeyRange batches = sharing(dbias.batch_stride, stored_batch, f.batch);
  const KeyRange heads = sharing(dbias.head_stride, stored_head, f.num_heads);
  for (std::int64_t b = batches.begin; b < batches.end; ++b) {
    for (std::int64_t h = heads.begin; h < heads.end; ++h) {
      const Head<T> head(f, far, b, h);
      for (std::int64_t i = 0; i < f.seqlen_q; ++i) {
        const Row<T> row(problem, head, i);
        double* const sums_row = sums + (rows == 1 ? 0 : i) * columns;
        for (std::int64_t j = row.keys().begin; j < row.keys().end; ++j) {
          sums_row[columns == 1 ? 0 : j] += row.pair(j).dscore;
        }
      }
    }
  }
  auto* const plane =
      static_cast<Statistic<T>*>(dbias.data) + stored_batch * dbias.batch_stride + stored_head * dbias.head_stride;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      plane[i * dbias.query_stride + j * dbias.key_stride] = static_cast<Statistic<T>>(sums[i * columns + j]);
    }
  }
}

template <class T>
void sink_gradient(const BackwardProblem& problem, std::int64_t head_index) {
  const Problem& f = problem.forward;
  double sum = 0.0;
  for (std::int64_t batch = 0; batch < f.batch; ++batch) {
    const Head<T> head(f, nullptr, batch, head_index);
    for (std::int64_t i = 0; i < head.sequence().seqlen_q; ++i) sum += Row<T>(problem, head, i).sink_gradient();
  }
  static_cast<Statistic<T>*>(problem.dsinks)[head_index] = static_cast<Statistic<T>>(sum);
}

// Rows of ragged tensors that belong to no sequence.
template <class T>
void write_unowned(const BackwardProblem& problem) {
  const Problem& f = problem.forward;
  const KeyRange queries = unowned_queries(f), keys = unowned_keys(f);
  for (std::int64_t h = 0; h < f.num_heads; ++h) {
    for (std::int64_t i = queries.begin; i < queries.end; ++i) std::fill_n(problem.dq.row<T>(0, h, i), f.head_dim, T{});
  }
  for (std::int64_t h = 0; h < f.num_heads_kv; ++h) {
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      std::fill_n(problem.dk.row<T>(0, h, j), f.head_dim, T{});
      std::fill_n(problem.dv.row<T>(0, h, j), f.head_dim_v, T{});
    }
  }
}

// How dbias is stored: (planes, plane_size), of which each batch and head has its own or all share one.
struct BiasPlanes {
  std::int64_t heads = 0, planes = 0, plane_size = 0;

  explicit BiasPlanes(const BackwardProblem& problem) {
    const Problem& f = problem.forward;
    const BiasOperand& dbias = problem.dbias;
    if (!dbias) return;
    heads = stored_size(dbias.head_stride, f.num_heads);
    planes = stored_size(dbias.batch_stride, f.batch) * heads;
    plane_size = stored_size(dbias.query_stride, f.seqlen_q) * stored_size(dbias.key_stride, f.seqlen_k);
  }
};

template <class T>
void backward_typed(const BackwardProblem& problem, const Far* far, const ExecutionContext& context) {
  const Problem& f = problem.forward;
  const std::int64_t groups = f.batch * f.num_heads_kv;
  const std::int64_t scratch_size = group_scratch_size(f, far == nullptr ? 1 : 2);
  const BiasPlanes bias(problem);
  // All at once: when memory is short nothing has been written yet.
  const Workspace workspace(context, f.device,
                            (groups * scratch_size + bias.planes * bias.plane_size) * sizeof(double));
  double* const group_scratch = workspace.as<double>();
  double* const bias_sums = group_scratch + groups * scratch_size;

  Executor& executor = executor_of(context);
  executor.run(groups, [&](std::int64_t index) {
    backward_group<T>(problem, far, index / f.num_heads_kv, index % f.num_heads_kv,
                      group_scratch + index * scratch_size);
  });
  write_unowned<T>(problem);
  executor.run(bias.planes, [&](std::int64_t index) {
    bias_gradient<T>(problem, pair_of(far), index / bias.heads, index % bias.heads,
                     bias_sums + index * bias.plane_size);
  });
  if (problem.dsinks != nullptr) {
    executor.run(f.num_heads, [&](std::int64_t head) { sink_gradient<T>(problem, head); });
  }
}

}  // namespace

void backward(const BackwardProblem& problem, const ExecutionContext& context) {
  with_float_type(problem.forward.dtype, [&](auto zero) { backward_typed<decltype(zero)>(problem, nullptr, context); });
}

void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context) {
  const Far far{problem.far, problem.dq_far, problem.dk_far};
  with_float_type(problem.near.forward.dtype,
                  [&](auto zero) { backward_typed<decltype(zero)>(problem.near, &far, context); });
}

}  // namespace onepass::reference

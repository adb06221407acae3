// driver/workload.h: the tensors of a case, on the host and in copies on the device.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cases.h"

namespace onepass::bench {

// A contiguous tensor that owns its memory.
struct Tensor {
  std::shared_ptr<std::byte[]> memory;
  TensorView view;

  static Tensor empty(DType dtype, const std::vector<std::int64_t>& shape, Device device = {});
  Tensor on(Device device) const;  // a copy there, from the host
  std::size_t bytes() const;
};

// Keys and values: dense tensors, or the storage of a cache.
struct Keys {
  Tensor k, v, k_scale, v_scale, page_table, seqlens;

  Keys on(Device device) const;
  KVCacheView cache(const Case& c, std::int64_t begin, std::int64_t end) const;  // of sequences [begin, end)
};

class Workload {
 public:
  // Random normal numbers; copies of keys and values on the device until they fill `rotate` bytes.
  Workload(const Case& c, Device device, double rotate);

  // The whole batch in one call; keys and values are those of the next copy.
  void run(const ExecutionContext& context);
  // The sequences that prefill, then those that decode.
  void run_apart(const ExecutionContext& context);
  bool has_parts() const { return case_.prefills() > 0 && case_.decodes() > 0; }

  // Largest difference of run()'s result to that of the reference backend, over the reference's largest value.
  double error() const;

 private:
  void call(const Keys& keys, const Tensor& q, const Tensor& out, const Tensor& slopes, const Tensor& bounds,
            const ExecutionContext& context) const;
  void call_part(std::int64_t begin, std::int64_t end, std::int64_t queries, const ExecutionContext& context) const;
  CachedOptions cached_options(const Tensor& slopes) const;
  const Keys& next();

  Case case_;
  Device device_;
  Tensor host_q_, host_slopes_, host_bounds_;
  Keys host_;
  Tensor q_, out_, slopes_, bounds_;
  std::vector<Keys> copies_;
  std::size_t copy_ = 0;
};

}  // namespace onepass::bench

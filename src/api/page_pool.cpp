#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "api/kv_cache.h"
#include "api/validate.h"
#include "onepass/kv_cache.h"

namespace onepass {
namespace {

constexpr const char* kPool = "page_pool";

std::int32_t* host_indices(api::Named tensor, std::initializer_list<std::int64_t> shape) {
  api::check_tensor(kPool, tensor, static_cast<int>(shape.size()));
  api::check_dtype(kPool, tensor, {DType::kInt32});
  api::check_device(kPool, tensor, Device{});
  api::check_shape(kPool, tensor, shape);
  if (shape.size() == 2 && tensor.view.shape[0] > 1 && tensor.view.strides[0] != tensor.view.shape[1]) {
    api::refuse(kPool, tensor.name, "stride " + std::to_string(tensor.view.strides[0]), "a contiguous tensor");
  }
  return static_cast<std::int32_t*>(tensor.view.data);
}

std::int64_t pages_of(std::int64_t tokens, std::int64_t page_size) { return (tokens + page_size - 1) / page_size; }

// Hands out pages without owner, lowest first.
class FreePages {
 public:
  FreePages(std::int32_t* reference_counts, std::int64_t num_pages) : counts_(reference_counts), end_(num_pages) {}

  std::int32_t take() {
    while (next_ < end_ && counts_[next_] != 0) ++next_;
    counts_[next_] = 1;
    return static_cast<std::int32_t>(next_);
  }

 private:
  std::int32_t* counts_;
  std::int64_t end_, next_ = 0;
};

}  // namespace

PagePool::PagePool(const TensorView& page_table, const TensorView& seqlens, const TensorView& reference_counts,
                   std::int64_t page_size)
    : sequences_(page_table.shape[0]),
      max_pages_(page_table.shape[1]),
      num_pages_(reference_counts.shape[0]),
      page_size_(page_size) {
  if (page_size < 1 || page_size > std::numeric_limits<std::int32_t>::max()) {
    api::refuse(kPool, "page_size", std::to_string(page_size), "1 to 2147483647");
  }
  page_table_ = host_indices({"page_table", page_table}, {sequences_, max_pages_});
  seqlens_ = host_indices({"seqlens", seqlens}, {sequences_});
  reference_counts_ = host_indices({"reference_counts", reference_counts}, {num_pages_});
  for (std::int64_t b = 0; b < sequences_; ++b) {
    if (seqlens_[b] >= 0 && seqlens_[b] <= max_pages_ * page_size_) continue;
    api::refuse(kPool, "seqlens", std::to_string(seqlens_[b]) + " for sequence " + std::to_string(b),
                "0 to the capacity of " + std::to_string(max_pages_ * page_size_));
  }
}

// The state is the caller's memory: pages are looked at before any is changed.
void PagePool::check_pages(const char* operation, std::int64_t sequence, std::int64_t begin, std::int64_t end) const {
  for (std::int64_t page = begin; page < end; ++page) {
    const std::int32_t id = entry(sequence, page);
    if (id >= -1 && id < num_pages_ && (id < 0 || reference_counts_[id] > 0)) continue;
    api::refuse(operation, "page_table",
                "page " + std::to_string(id) + " for sequence " + std::to_string(sequence) +
                    (id >= 0 && id < num_pages_ ? ", which has no owner" : ""),
                "a page of the pool that is in use, or -1");
  }
}

std::int32_t& PagePool::entry(std::int64_t sequence, std::int64_t index) const {
  return page_table_[sequence * max_pages_ + index];
}

void PagePool::check_sequence(const char* operation, const char* argument, std::int64_t sequence) const {
  if (sequence >= 0 && sequence < sequences_) return;
  api::refuse(operation, argument, std::to_string(sequence), "0 to " + std::to_string(sequences_ - 1));
}

// Pages of a growing sequence: those that are missing, and those whose content others see too.
std::vector<PageCopy> PagePool::reserve(std::span<const std::int64_t> counts) {
  constexpr const char* kOperation = "page_pool.reserve";
  if (static_cast<std::int64_t>(counts.size()) != sequences_) {
    api::refuse(kOperation, "counts", std::to_string(counts.size()) + " numbers", std::to_string(sequences_));
  }
  const auto for_each_page = [&](auto&& visit) {
    for (std::int64_t b = 0; b < sequences_; ++b) {
      if (counts[b] == 0) continue;
      const std::int64_t end = pages_of(seqlens_[b] + counts[b], page_size_);
      for (std::int64_t page = seqlens_[b] / page_size_; page < end; ++page) {
        std::int32_t& id = entry(b, page);
        if (id < 0 || reference_counts_[id] > 1) visit(b, page, id);
      }
    }
  };
  for (std::int64_t b = 0; b < sequences_; ++b) {
    if (counts[b] < 0) api::refuse(kOperation, "counts", std::to_string(counts[b]), "0 or more");
    const std::int64_t capacity = max_pages_ * page_size_;
    if (counts[b] > capacity - seqlens_[b]) {
      api::refuse(kOperation, "counts",
                  std::to_string(counts[b]) + " new tokens behind " + std::to_string(seqlens_[b]) + " for sequence " +
                      std::to_string(b),
                  "room for them in the capacity of " + std::to_string(capacity));
    }
    check_pages(kOperation, b, seqlens_[b] / page_size_, pages_of(seqlens_[b] + counts[b], page_size_));
  }
  // Sequences that share a page and both grow: the last owner keeps it, so this counts one too many at worst.
  std::int64_t wanted = 0;
  for_each_page([&](std::int64_t, std::int64_t, std::int32_t&) { ++wanted; });
  if (const std::int64_t available = free_pages(); wanted > available) {
    api::refuse(kOperation, "counts", "a need for " + std::to_string(wanted) + " pages",
                "at most the " + std::to_string(available) + " free ones", ErrorCode::kOutOfMemory);
  }
  std::vector<PageCopy> copies;
  FreePages pages(reference_counts_, num_pages_);
  for_each_page([&](std::int64_t b, std::int64_t page, std::int32_t& id) {
    const std::int32_t target = pages.take();
    if (id >= 0) {
      --reference_counts_[id];
      if (seqlens_[b] > page * page_size_) copies.push_back({id, target});
    }
    id = target;
  });
  return copies;
}

void PagePool::release(std::int64_t sequence, std::int64_t from) {
  for (std::int64_t page = from; page < max_pages_ && entry(sequence, page) >= 0; ++page) {
    --reference_counts_[entry(sequence, page)];
    entry(sequence, page) = -1;
  }
}

void PagePool::truncate(std::int64_t sequence, std::int64_t length) {
  constexpr const char* kOperation = "page_pool.truncate";
  check_sequence(kOperation, "sequence", sequence);
  if (length < 0 || length > seqlens_[sequence]) {
    api::refuse(kOperation, "length", std::to_string(length),
                "0 to the " + std::to_string(seqlens_[sequence]) + " tokens of the sequence");
  }
  check_pages(kOperation, sequence, pages_of(length, page_size_), max_pages_);
  release(sequence, pages_of(length, page_size_));
  seqlens_[sequence] = static_cast<std::int32_t>(length);
}

void PagePool::fork(std::int64_t source, std::int64_t target, std::optional<std::int64_t> length) {
  constexpr const char* kOperation = "page_pool.fork";
  check_sequence(kOperation, "source", source);
  check_sequence(kOperation, "target", target);
  const std::int64_t tokens = length.value_or(seqlens_[source]);
  if (tokens < 0 || tokens > seqlens_[source]) {
    api::refuse(kOperation, "length", std::to_string(tokens),
                "0 to the " + std::to_string(seqlens_[source]) + " tokens of the source");
  }
  if (source == target) api::refuse(kOperation, "target", "the source", "another sequence");
  const std::int64_t shared = pages_of(tokens, page_size_);
  check_pages(kOperation, source, 0, shared);
  check_pages(kOperation, target, 0, max_pages_);
  for (std::int64_t page = 0; page < shared; ++page) {
    if (entry(source, page) >= 0) continue;
    api::refuse(kOperation, "page_table", "no page for token " + std::to_string(page * page_size_) + " of the source",
                "pages for all its tokens");
  }
  release(target, 0);
  for (std::int64_t page = 0; page < shared; ++page) {
    entry(target, page) = entry(source, page);
    ++reference_counts_[entry(source, page)];
  }
  seqlens_[target] = static_cast<std::int32_t>(tokens);
}

std::int64_t PagePool::free_pages() const { return std::count(reference_counts_, reference_counts_ + num_pages_, 0); }

void copy_pages(const KVCacheView& view, std::span<const PageCopy> copies) {
  constexpr const char* kOperation = "copy_pages";
  const KVStorage cache = api::lower_cache(kOperation, view);
  if (view.k.device.type != DeviceType::kCpu) {
    api::refuse(kOperation, "cache.k", api::describe(view.k), "a cache on the cpu", ErrorCode::kInvalidType);
  }
  for (const PageCopy& copy : copies) {
    for (std::int32_t page : {copy.source, copy.target}) {
      if (page >= 0 && page < cache.num_blocks) continue;
      api::refuse(kOperation, "copies", "page " + std::to_string(page), "0 to " + std::to_string(cache.num_blocks - 1));
    }
  }
  const auto copy_rows = [&](const PageCopy& copy, const Operand& rows, std::int64_t dim) {
    const std::int64_t size = size_of(cache.dtype);
    const auto row = [&](std::int64_t page, std::int64_t head, std::int64_t token) {
      return static_cast<std::byte*>(rows.data) +
             (page * rows.batch_stride + head * rows.head_stride + token * rows.token_stride) * size;
    };
    for (std::int64_t head = 0; head < cache.num_heads_kv; ++head) {
      for (std::int64_t token = 0; token < cache.block_tokens; ++token) {
        std::memcpy(row(copy.target, head, token), row(copy.source, head, token), dim * size);
      }
    }
  };
  const auto copy_scales = [&](const PageCopy& copy, const CacheScale& scale, std::int64_t dim) {
    if (!scale || cache.granularity == ScaleGranularity::kTensor) return;
    const std::int64_t heads = cache.granularity == ScaleGranularity::kToken ? 1 : cache.num_heads_kv;
    const std::int64_t groups = std::max<std::int64_t>(1, dim / cache.group_channels);
    for (std::int64_t head = 0; head < heads; ++head) {
      for (std::int64_t token = 0; token < cache.block_tokens; ++token) {
        std::copy_n(scale.at(copy.source, head, token), groups, scale.at(copy.target, head, token));
      }
    }
  };
  for (const PageCopy& copy : copies) {
    copy_rows(copy, cache.k, cache.head_dim);
    copy_rows(copy, cache.v, cache.head_dim_v);
    copy_scales(copy, cache.k_scale, cache.head_dim);
    copy_scales(copy, cache.v_scale, cache.head_dim_v);
  }
}

}  // namespace onepass

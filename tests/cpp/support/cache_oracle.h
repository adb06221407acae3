// support/cache_oracle.h: what attention over a cache should give, from what the cache holds.
#pragma once

#include "support/cache.h"

namespace onepass::test {

// In the order of CacheInstance::loaded_out and loaded_lse.
struct Expected {
  Values out, lse, naive_out, naive_lse;
};
Expected expected(const CacheInstance& cache);

}  // namespace onepass::test

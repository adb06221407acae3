#include "kernels.h"
#include "onepass/onepass.h"

namespace onepass::binding {

void info(Stack stack, std::uint64_t, std::uint64_t) { set_results(stack, onepass::info()); }
void version(Stack stack, std::uint64_t, std::uint64_t) { set_results(stack, std::string(onepass::version())); }

}  // namespace onepass::binding

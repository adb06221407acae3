#include "cpu/isa.h"

#include <strings.h>

#include <cstdlib>

namespace onepass::cpu {
namespace {

// Calls f with each tier's bit in `targets`, best first (Highway gives better tiers lower bits).
template <class F>
void for_each_target(std::int64_t targets, F&& f) {
  for (std::int64_t rest = targets; rest != 0; rest &= rest - 1) f(rest & -rest);
}

std::string names_of(std::int64_t targets) {
  std::string names;
  for_each_target(targets, [&](std::int64_t target) {
    if (!names.empty()) names += ' ';
    names += hwy::TargetName(target);
  });
  return names.empty() ? "none" : names;
}

std::int64_t present_targets() {
  static const std::int64_t present = HWY_TARGETS & hwy::SupportedTargets();
  return present;
}

const char* requested() {
  const char* name = std::getenv("ONEPASS_CPU_ISA");
  return name == nullptr || *name == '\0' ? nullptr : name;
}

}  // namespace

std::int64_t isa_in_use() {
  const std::int64_t present = present_targets();
  const char* const name = requested();
  if (name == nullptr) return present & -present;
  std::int64_t chosen = 0;
  for_each_target(present, [&](std::int64_t target) {
    if (strcasecmp(hwy::TargetName(target), name) == 0) chosen = target;
  });
  return chosen;
}

Unsupported isa_missing() {
  if (isa_in_use() != 0) return std::nullopt;
  const std::string built = names_of(HWY_TARGETS), present = names_of(present_targets());
  if (requested() == nullptr) return "this processor has none of the instruction sets " + built;
  return std::string("ONEPASS_CPU_ISA: got ") + requested() + "; need one of " + present + " (built: " + built + ")";
}

std::string describe_isa() { return names_of(isa_in_use()) + " (built for " + names_of(HWY_TARGETS) + ")"; }

}  // namespace onepass::cpu

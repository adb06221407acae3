// onepass/error.h: the one exception type of the library.
#pragma once

#include <stdexcept>
#include <string>

#include "onepass/export.h"

namespace onepass {

enum class ErrorCode : int {
  kInvalidArgument = 1,  // a value, shape, stride or combination that no backend could accept
  kInvalidType = 2,      // a dtype or device that the operation does not take
  kUnsupported = 3,      // a valid request that no built and present backend serves; the message says why
  kOutOfMemory = 4,      // the context's allocator returned null
  kDevice = 5,           // a CUDA call failed
  kInternal = 6,         // a broken invariant of this library
};

// Thrown before anything is launched or written. what() reads
// "<operation>: <argument>: got <received>; need <required>".
class ONEPASS_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace onepass

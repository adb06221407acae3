// csrc/kernels.h: the operations' boxed kernels (calling convention: arguments.h; schemas: library.cpp). One kernel
// serves the CPU and CUDA.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace onepass::binding {

void plain_attention(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);
void attention(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);
void attention_with_lse(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);
void attention_backward(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);

void varlen_attention(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);
void varlen_attention_with_lse(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);
void varlen_attention_backward(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);

void total_attention(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);

void piecewise_attention(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);
void piecewise_attention_backward(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);

void merge_states(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);

void info(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);
void version(Stack stack, std::uint64_t num_arguments, std::uint64_t num_results);

}  // namespace onepass::binding

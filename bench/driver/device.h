// driver/device.h: memory and time of the device that is measured.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "onepass/tensor.h"

namespace onepass::bench {

// Throws Error when this build or machine has no such device.
void require_device(Device device);

// The model of the CPU or GPU.
std::string machine_name(Device device);

std::shared_ptr<std::byte[]> allocate(std::size_t bytes, Device device);
void copy_to_device(void* target, const void* host, std::size_t bytes, Device device);
void copy_to_host(void* host, const void* source, std::size_t bytes, Device device);

// Milliseconds from the start of the first call to the end of the last.
double milliseconds(Device device, int repeats, const std::function<void()>& call);

// Shared by all builds.
std::string cpu_name();
std::shared_ptr<std::byte[]> allocate_host(std::size_t bytes);
double host_milliseconds(int repeats, const std::function<void()>& call);

}  // namespace onepass::bench

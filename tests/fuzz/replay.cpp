// fuzz/replay.cpp: runs a fuzz target without libFuzzer.
//   replay COUNT [SEED]   COUNT inputs from a generator with a fixed seed
//   replay FILE…          the inputs in these files, e.g. what libFuzzer found
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  char* end = nullptr;
  const long count = argc > 1 ? std::strtol(argv[1], &end, 10) : 0;
  if (argc > 1 && *end == '\0') {
    std::mt19937_64 generator(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
    std::vector<std::uint8_t> input(128);
    for (long i = 0; i < count; ++i) {
      for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(generator());
      std::ofstream("fuzz_last_input", std::ios::binary)
          .write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size()));
      LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    std::printf("%ld inputs\n", count);
    return 0;
  }
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> input{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
  }
  return 0;
}

// GoogleTest's main, which prints which instruction set, GPU and threads the results stand for.
#include <gtest/gtest.h>

#include <iostream>

#include "onepass/onepass.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  std::cout << onepass::info();
  return RUN_ALL_TESTS();
}

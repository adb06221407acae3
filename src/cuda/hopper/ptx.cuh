// cuda/hopper/ptx.cuh: one wrapper per PTX instruction that only the Hopper kernels use, beyond wgmma.
#pragma once

#include <cuda.h>

#include "cuda/common/ptx.cuh"

namespace onepass::cuda::hopper {

ONEPASS_DEVICE void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
ONEPASS_DEVICE void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and announces the bytes that copies will complete.
ONEPASS_DEVICE void barrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns once the phase of the given parity has completed.
ONEPASS_DEVICE void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra END;\n"
      "bra AGAIN;\nEND:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
ONEPASS_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Ordinary shared-memory stores before it become visible to wgmma and TMA after the next barrier.
ONEPASS_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

ONEPASS_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// One box of a (dim, token, head, batch) tensor. Elements outside the tensor are read as zero and not written.
ONEPASS_DEVICE void tma_load(std::uint32_t destination, const CUtensorMap* map, std::uint32_t barrier, int dim,
                             int token, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(dim), "r"(token), "r"(head), "r"(batch)
      : "memory");
}
ONEPASS_DEVICE void tma_store(std::uint32_t source, const CUtensorMap* map, int dim, int token, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(source), "r"(dim), "r"(token), "r"(head), "r"(batch)
               : "memory");
}
// Adds floats to as many in global memory: `bytes`, a multiple of 16, at 16-byte addresses.
ONEPASS_DEVICE void bulk_add(float* destination, std::uint32_t source, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination),
               "r"(source), "r"(bytes)
               : "memory");
}
ONEPASS_DEVICE void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
ONEPASS_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The calling thread's stores, but for the last kPending groups, have read their shared memory.
template <int kPending = 0>
ONEPASS_DEVICE void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
ONEPASS_DEVICE void store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l%8 of matrix l/8.
ONEPASS_DEVICE void store_matrices(std::uint32_t address, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                   std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
ONEPASS_DEVICE void min_shared(std::uint32_t address, int value) {
  asm volatile("red.shared.min.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// The first lane's value, which the compiler then knows to be the whole warp's: what follows from it, matrix
// descriptors above all, it keeps in uniform registers. __shfl_sync of a value that it takes for uniform anyway is
// folded away.
ONEPASS_DEVICE std::uint32_t first_lane(std::uint32_t x) {
  asm volatile("shfl.sync.idx.b32 %0, %0, 0, 31, -1;" : "+r"(x));
  return x;
}

template <int kRegisters>
ONEPASS_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ONEPASS_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

ONEPASS_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace onepass::cuda::hopper

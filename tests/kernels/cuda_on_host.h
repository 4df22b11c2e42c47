// What CUDA kernels need, on threads of the host: g++ compiles csrc/cuda/kernels.cu as
// C++20 with this header in front, and its launches run when they are made. The threads
// of a block are threads of the host, barriers are barriers; blocks run one by one, so
// shared memory is static. It shows what kernels compute, and sanitizers see their
// races; it says nothing about speed.

#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

using std::max;
using std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
  uint32_t x, y, z;
};

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
struct cudaFuncAttributes {};

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace on_host {

struct Warp {
  std::barrier<> barrier{32};
  uint32_t lanes[32];
};

struct Block {
  explicit Block(uint32_t threads)
      : barrier(threads), warps(std::make_unique<Warp[]>(threads / 32)) {}
  std::barrier<> barrier;
  std::unique_ptr<Warp[]> warps;
  int any = 0;
};

inline thread_local Block* block;

}  // namespace on_host

inline thread_local dim3 threadIdx, blockIdx;

inline void __syncthreads() { on_host::block->barrier.arrive_and_wait(); }

inline int __syncthreads_or(int value) {
  on_host::Block& own = *on_host::block;
  if (value) __atomic_store_n(&own.any, 1, __ATOMIC_RELAXED);
  __syncthreads();
  const int found = __atomic_load_n(&own.any, __ATOMIC_RELAXED);
  __syncthreads();
  if (threadIdx.x == 0) own.any = 0;
  __syncthreads();
  return found;
}

template <typename T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicOr(T* at, T value) {
  return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);
}

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __clz(uint32_t x) { return std::countl_zero(x); }

namespace on_host {

// What `read` makes of the values of all lanes. A warp that is not whole would hang on
// a GPU or compute anything.
template <typename Read>
uint32_t exchange(uint32_t mask, uint32_t value, Read read) {
  if (mask != 0xffffffff) std::abort();
  Warp& own = block->warps[threadIdx.x / 32];
  own.lanes[threadIdx.x % 32] = value;
  own.barrier.arrive_and_wait();
  const uint32_t found = read(own.lanes);
  own.barrier.arrive_and_wait();
  return found;
}

}  // namespace on_host

inline uint32_t __ballot_sync(uint32_t mask, bool value) {
  return on_host::exchange(mask, value, [](const uint32_t* lanes) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= lanes[lane] << lane;
    return bits;
  });
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value) {
  return on_host::exchange(mask, value, [](const uint32_t* lanes) {
    uint32_t sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += lanes[lane];
    return sum;
  });
}
inline uint32_t __shfl_sync(uint32_t mask, uint32_t value, int lane) {
  return on_host::exchange(mask, value,
                           [&](const uint32_t* lanes) { return lanes[lane % 32]; });
}
inline uint32_t __shfl_down_sync(uint32_t mask, uint32_t value, int step) {
  const int own = threadIdx.x % 32, from = own + step < 32 ? own + step : own;
  return on_host::exchange(mask, value,
                           [&](const uint32_t* lanes) { return lanes[from]; });
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                               void (*kernel)(Params...), Args... args) {
  const uint32_t count = config->blockDim.x;
  const dim3 grid = config->gridDim;
  on_host::Block block(count);
  const auto run = [&](uint32_t thread) {
    on_host::block = &block;
    threadIdx = dim3(thread, 0, 0);
    for (uint32_t y = 0; y < grid.y; ++y)
      for (uint32_t x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, 0);
        kernel(args...);
        __syncthreads();
      }
  };
  std::vector<std::thread> threads;
  for (uint32_t thread = 0; thread < count; ++thread) threads.emplace_back(run, thread);
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}

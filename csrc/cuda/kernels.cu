// The kernels for GPUs behind plain C functions, which ops/cuda.py calls by ctypes with
// raw pointers and a stream: the build needs nothing but nvcc (torch's stable ABI would
// need torch's headers), and one library serves all versions of torch and Python.
// They return a cudaError, never wait for the GPU, and may be captured in a graph.

#include "../api.h"
#include "compact.cuh"
#include "select.cuh"

#ifndef KVC_THREADS  // of a block; tests on the host take fewer
#define KVC_THREADS 1024
#define KVC_MOVE_THREADS 256
#endif

namespace {

using namespace kvc;

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads,
                   cudaStream_t stream, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Bytes that can be moved at once: the largest power of two that divides all steps.
int64_t unit_of(const Compact& call) {
  if (call.keys.element != 1 || call.values.element != 1) return call.type_size;
  int64_t bits = int64_t(call.cache) | 16;
  for (int64_t step : {call.head_size, call.block_step, call.head_step,
                       call.keys.first, call.keys.slot, call.values.first,
                       call.values.slot})
    bits |= step * call.type_size;
  return bits & -bits;
}

Place in_cache(const Compact& call, const int64_t* blocks, int64_t unit) {
  const int64_t size = call.type_size;
  const auto half = [&](const Order& order) {
    const int64_t step = order.element == 1 ? unit : order.element * size;
    return Half{order.first * size, order.slot * size, step};
  };
  return {(char*)call.cache,
          blocks,
          call.block_step * size,
          call.head_step * size,
          {half(call.keys), half(call.values)}};
}

// A cache in vLLM's order with just the target's blocks, numbered in turn.
Place in_staging(const Compact& call, char* staging, int64_t unit) {
  const int64_t vector = call.head_size * call.type_size;
  const int64_t page = call.block_size * 2 * vector;
  return {staging,
          nullptr,
          call.kv_heads * page,
          page,
          {{0, 2 * vector, unit}, {vector, 2 * vector, unit}}};
}

template <typename Unit>
cudaError_t compact(const Compact& call, int64_t sources, char* staging,
                    cudaStream_t stream) {
  const int64_t unit = sizeof(Unit), size = call.type_size;
  const uint32_t units = uint32_t(call.head_size * size / unit);
  const uint32_t tile = tile_of(units, KVC_MOVE_THREADS);
  const dim3 grid(uint32_t((call.tokens + tile - 1) / tile), uint32_t(call.kv_heads));
  const int64_t targets = (call.tokens + call.block_size - 1) / call.block_size;
  const auto move = [&](Place from, Place to, const int64_t* kept, int32_t* flag,
                        int32_t value) {
    const Move own{from, to, kept, call.tokens, call.block_size, units, tile};
    return launch(move_tokens<Unit, KVC_MOVE_THREADS>, grid, KVC_MOVE_THREADS, stream,
                  own, flag, value);
  };
  const Place source = in_cache(call, call.source, unit);
  const Place target = in_cache(call, call.target, unit);
  if (!staging) return move(source, target, call.kept, nullptr, 0);
  int32_t* flag = (int32_t*)staging;
  const Place between = in_staging(call, staging + STAGING_FLAG, unit);
  cudaError_t error = launch(find_overlap<KVC_THREADS>, dim3(1), KVC_THREADS, stream,
                             call.source, sources, call.target, targets, flag);
  if (!error) error = move(source, target, call.kept, flag, 0);
  if (!error) error = move(source, between, call.kept, flag, 1);
  if (!error) error = move(between, target, nullptr, flag, 1);
  return error;
}

}  // namespace

extern "C" {

// `staging` holds STAGING_FLAG bytes and all that is moved, aligned to 16 bytes. Where
// no target block is among the `sources` blocks of the source, it may be null.
int kvc_cuda_compact(const Compact* call, int64_t sources, void* staging,
                     void* stream) {
  if (call->tokens == 0 || call->kv_heads == 0 || call->head_size == 0) return 0;
  const auto run = [&](auto unit) {
    return int(compact<decltype(unit)>(*call, sources, (char*)staging,
                                       (cudaStream_t)stream));
  };
  switch (unit_of(*call)) {
    case 16:
      return run(uint4{});
    case 8:
      return run(uint2{});
    case 4:
      return run(uint32_t{});
    case 2:
      return run(uint16_t{});
    default:
      return run(uint8_t{});
  }
}

// Of each row of [rows, tokens] scores, `step` floats apart: [rows, count] positions.
int kvc_cuda_select(const float* scores, int64_t rows, int64_t step, int64_t tokens,
                    int64_t count, int64_t* kept, void* stream) {
  if (rows == 0 || count == 0) return 0;
  return int(launch(select_row<KVC_THREADS>, dim3(uint32_t(rows)), KVC_THREADS,
                    (cudaStream_t)stream, scores, step, tokens, count, kept));
}

// Whether the current device can run what was compiled. All kernels are loaded by it,
// so that none has to be while a graph is captured.
int kvc_cuda_ready() {
  const void* kernels[] = {(const void*)move_tokens<uint4, KVC_MOVE_THREADS>,
                           (const void*)move_tokens<uint2, KVC_MOVE_THREADS>,
                           (const void*)move_tokens<uint32_t, KVC_MOVE_THREADS>,
                           (const void*)move_tokens<uint16_t, KVC_MOVE_THREADS>,
                           (const void*)move_tokens<uint8_t, KVC_MOVE_THREADS>,
                           (const void*)find_overlap<KVC_THREADS>,
                           (const void*)select_row<KVC_THREADS>};
  cudaFuncAttributes found;
  cudaError_t error = cudaSuccess;
  for (const void* kernel : kernels)
    if (!error) error = cudaFuncGetAttributes(&found, kernel);
  cudaGetLastError();  // a later launch is not to meet it
  return int(error);
}

const char* kvc_cuda_text(int error) { return cudaGetErrorString(cudaError_t(error)); }
}

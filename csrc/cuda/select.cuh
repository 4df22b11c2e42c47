// Positions of the highest scores: the meaning is vllm_kvcompress/ops/select.py.
//
// A block of threads takes a row. It finds the lowest score that is kept by its digits,
// the highest first, counting in shared memory (a radix select), and then writes what
// is kept, each warp from a span of its own. The row is read five times, nothing but
// the result is written.

#pragma once

#include <cstdint>

namespace kvc {

constexpr uint32_t ALL_LANES = 0xffffffff;
constexpr int DIGIT = 11;  // bits
constexpr int BINS = 1 << DIGIT, GROUPS = 32, GROUP = BINS / GROUPS;
static_assert(GROUP == 64, "two bins for every lane of a warp");

// Numbers in the order of scores: -0 equals 0, and NaN is the highest. None is 0.
__device__ inline uint32_t rank_of(float score) {
  const uint32_t bits = __float_as_uint(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  if (bits == 0x80000000u) return bits;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Calls take(position, rank) for a span of a row, `width` lanes side by side, with 0
// for positions behind its end. Several loads are in flight.
template <typename Take>
__device__ void each_rank(const float* row, int64_t first, int64_t end, int lane,
                          int width, Take take) {
  constexpr int LOADS = 8;
  for (; first < end; first += LOADS * width) {
    float scores[LOADS] = {};
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      const int64_t at = first + k * width + lane;
      if (at < end) scores[k] = row[at];
    }
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      const int64_t at = first + k * width + lane;
      take(at, at < end ? rank_of(scores[k]) : 0);
    }
  }
}

// The highest lane that makes `wanted` together with all above it. What those above
// it hold is taken from `wanted`.
__device__ inline int reach(uint32_t held, int lane, uint32_t& wanted) {
  uint32_t sum = held;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t above = __shfl_down_sync(ALL_LANES, sum, step);
    if (lane + step < 32) sum += above;
  }
  const int found = 31 - __clz(__ballot_sync(ALL_LANES, sum >= wanted));
  wanted -= __shfl_sync(ALL_LANES, sum - held, found);
  return found;
}

// The bin with the last one of `wanted`, from the highest bin on. What the bins above
// it hold is taken from `wanted`.
template <int THREADS>
__device__ uint32_t find_bin(const uint32_t* bins, uint32_t* groups,
                             uint32_t& wanted) {
  const int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < GROUPS; group += THREADS / 32) {
    const uint32_t* own = bins + group * GROUP + 2 * lane;
    const uint32_t sum = __reduce_add_sync(ALL_LANES, own[0] + own[1]);
    if (lane == 0) groups[group] = sum;
  }
  __syncthreads();
  int bin = reach(groups[lane], lane, wanted) * GROUP;
  const uint32_t* own = bins + bin + 2 * lane;
  bin += 2 * reach(own[0] + own[1], lane, wanted);
  if (wanted <= bins[bin + 1]) return bin + 1;
  wanted -= bins[bin + 1];
  return bin;
}

// A grid of one block of threads per row. Counts are below 2^32.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    select_row(const float* scores, int64_t step, int64_t tokens, int64_t count,
               int64_t* kept) {
  static_assert(THREADS % 32 == 0, "whole warps");
  __shared__ uint32_t bins[BINS], groups[GROUPS];
  __shared__ uint32_t above[THREADS / 32], equal[THREADS / 32];
  const float* row = scores + blockIdx.x * step;
  kept += blockIdx.x * count;

  uint32_t least = 0, known = 0;  // of the least rank that is kept; its known bits
  uint32_t wanted = uint32_t(count);
  for (int shift = 32 - DIGIT; known != ALL_LANES; shift = max(shift - DIGIT, 0)) {
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) bins[bin] = 0;
    __syncthreads();
    each_rank(row, 0, tokens, threadIdx.x, THREADS, [&](int64_t, uint32_t rank) {
      if ((rank & known) == least) atomicAdd(&bins[(rank >> shift) % BINS], 1u);
    });
    __syncthreads();
    least |= find_bin<THREADS>(bins, groups, wanted) << shift;
    known = ALL_LANES << shift;
    __syncthreads();
  }

  // Of those that equal the least, the first `wanted` stay.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t span = (tokens + THREADS - 1) / THREADS * 32;
  const int64_t first = warp * span, end = min(first + span, tokens);
  uint32_t higher = 0, same = 0;
  each_rank(row, first, end, lane, 32, [&](int64_t, uint32_t rank) {
    higher += __popc(__ballot_sync(ALL_LANES, rank > least));
    same += __popc(__ballot_sync(ALL_LANES, rank == least));
  });
  if (lane == 0) above[warp] = higher, equal[warp] = same;
  __syncthreads();
  higher = same = 0;
  for (int before = 0; before < warp; ++before) {
    higher += above[before];
    same += equal[before];
  }
  kept += higher + min(same, wanted);
  const uint32_t before = (1u << lane) - 1;
  each_rank(row, first, end, lane, 32, [&](int64_t position, uint32_t rank) {
    const uint32_t alike = __ballot_sync(ALL_LANES, rank == least);
    const bool stays =
        rank > least || (rank == least && same + __popc(alike & before) < wanted);
    const uint32_t staying = __ballot_sync(ALL_LANES, stays);
    if (stays) kept[__popc(staying & before)] = position;
    kept += __popc(staying);
    same += __popc(alike);
  });
}

}  // namespace kvc

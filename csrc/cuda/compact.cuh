// Kept tokens into pages of their own: the meaning is vllm_kvcompress/ops/compact.py.
//
// A move reads vectors (a token's key, or its value) at one place and writes them at
// another. A block of threads looks up where its vectors lie, then holds as much of
// them as fits into its registers: 16 bytes a unit, UNROLL units a thread in flight.
// In vLLM's order a key and its value are neighbours, so a warp reads whole rows.

#pragma once

#include <cstdint>

namespace kvc {

struct Half {  // the keys in a page, or the values; bytes
  int64_t first, slot, unit;  // address of the first; to the next token, unit
};

struct Place {
  char* cache;
  const int64_t* blocks;  // that tokens fill in turn; null: 0, 1, ...
  int64_t block_step, head_step;  // bytes
  Half halves[2];
};

struct Move {
  Place from, to;
  const int64_t* kept;  // [kv_heads, tokens], positions to read; null: 0, 1, ...
  int64_t tokens, block_size;
  uint32_t units, tile;  // of a vector; tokens that a block of threads moves
};

constexpr int UNROLL = 4;
constexpr int MOST_TOKENS = 128;  // of a tile

// Tokens of a tile: as many as the threads hold at once.
inline uint32_t tile_of(uint32_t units, int threads) {
  const uint32_t tokens = UNROLL * threads / (2 * units);
  return tokens < 1 ? 1 : tokens > MOST_TOKENS ? MOST_TOKENS : tokens;
}

// Bytes from the cache's address to a vector.
__device__ inline int64_t offset_of(const Place& place, int64_t head, int64_t position,
                                    int64_t block_size, int half) {
  const int64_t own = position / block_size, slot = position % block_size;
  const int64_t block = place.blocks ? place.blocks[own] : own;
  const Half& order = place.halves[half];
  return block * place.block_step + head * place.head_step + order.first +
         slot * order.slot;
}

// One move, by a grid of [tiles, kv_heads]. It takes place if the flag has the value.
template <typename Unit, int THREADS>
__global__ void __launch_bounds__(THREADS)
    move_tokens(const Move move, const int32_t* flag, int32_t value) {
  // Offsets: of pointers from shared memory it is unknown that they are global.
  __shared__ int64_t from[2 * MOST_TOKENS], to[2 * MOST_TOKENS];
  if (flag && *flag != value) return;
  const int64_t first = int64_t(blockIdx.x) * move.tile, head = blockIdx.y;
  const int64_t left = move.tokens - first;
  const uint32_t vectors = 2 * (left < move.tile ? uint32_t(left) : move.tile);
  for (uint32_t vector = threadIdx.x; vector < vectors; vector += THREADS) {
    const int64_t token = first + vector / 2;
    const int64_t read = move.kept ? move.kept[head * move.tokens + token] : token;
    from[vector] = offset_of(move.from, head, read, move.block_size, vector % 2);
    to[vector] = offset_of(move.to, head, token, move.block_size, vector % 2);
  }
  __syncthreads();
  const uint32_t units = vectors * move.units;
  for (uint32_t start = threadIdx.x; start < units; start += UNROLL * THREADS) {
    Unit held[UNROLL] = {};
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      const uint32_t at = start + k * THREADS, vector = at / move.units;
      if (at >= units) break;
      const int64_t step = move.from.halves[vector % 2].unit;
      const int64_t offset = from[vector] + at % move.units * step;
      held[k] = *(const Unit*)(move.from.cache + offset);
    }
#pragma unroll
    for (int k = 0; k < UNROLL; ++k) {
      const uint32_t at = start + k * THREADS, vector = at / move.units;
      if (at >= units) break;
      const int64_t step = move.to.halves[vector % 2].unit;
      const int64_t offset = to[vector] + at % move.units * step;
      *(Unit*)(move.to.cache + offset) = held[k];
    }
  }
}

// Sets the flag to whether a target block is among the source's, by one block of
// threads. Block numbers share the bits of a small map: it may err towards yes.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    find_overlap(const int64_t* source, int64_t sources, const int64_t* target,
                 int64_t targets, int32_t* flag) {
  constexpr uint32_t BITS = 1 << 18;
  __shared__ uint32_t map[BITS / 32];
  for (uint32_t word = threadIdx.x; word < BITS / 32; word += THREADS) map[word] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < targets; i += THREADS) {
    const uint32_t bit = target[i] % BITS;
    atomicOr(&map[bit / 32], 1u << bit % 32);
  }
  __syncthreads();
  int found = 0;
  for (int64_t i = threadIdx.x; i < sources; i += THREADS) {
    const uint32_t bit = source[i] % BITS;
    found |= map[bit / 32] >> bit % 32 & 1;
  }
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) *flag = found;
}

}  // namespace kvc

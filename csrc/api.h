// What Python passes, by pointer; vllm_kvcompress/ops/native_calls.py has the same
// fields. No header of Python or torch is needed.

#pragma once

#include <cstdint>

enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT8 = 2, FLOAT16 = 3 };

struct Order {  // of a page's elements
  int64_t first, slot, element;  // address of the first; to the next token, element
  const int32_t* offsets;        // [block_size, head_size] if tiled, else null

  int64_t offset(int64_t token, int64_t d, int64_t head_size) const {
    return offsets ? offsets[token * head_size + d] : first + token * slot + d * element;
  }
};

struct WindowScores {
  const void* cache;
  const int64_t* blocks;  // [kv_heads, count]
  const float* queries;   // [kv_heads, rows, head_size]; a row is (query head, query)
  const float* weights;   // [rows], what a query's votes count
  const int64_t* seen;    // [rows], tokens that it sees
  float* scores;          // [kv_heads, tokens], filled
  int64_t type, kv_heads, rows, tokens, head_size, block_size;
  int64_t block_step, head_step, blocks_step;  // elements
  Order order;
  float scale, softcap;
};

struct AttendPages {
  const void* cache;
  const int64_t *blocks, *starts, *lens;  // [.], [rows + 1], [rows]
  const float* query;                     // [rows, kv_heads, group, head_size]
  const void* scales;                     // [2, num_blocks, block_size, kv_heads]
  float* output;                          // of the query's shape, filled
  int64_t type, half_scales, rows, kv_heads, group, head_size, block_size;
  int64_t block_step, head_step, scales_step;  // elements
  int64_t tasks;                               // into which to split the work, at least
  Order keys, values;
  float scale, softcap;
};

struct Compact {
  void* cache;
  const int64_t *source, *kept, *target;  // [.], [kv_heads, tokens], [.]
  int64_t type_size, kv_heads, tokens, head_size, block_size;
  int64_t block_step, head_step;
  Order keys, values;
};

constexpr int64_t STAGING_FLAG = 16;  // bytes before what is staged on a GPU

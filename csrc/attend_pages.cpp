// Attention of one new token per row over paged keys and values with factors: the
// meaning is vllm_kvcompress/ops/attend.py. A page of a KV head holds its keys by
// element, [head_size, block_size], and its values by token, [block_size, head_size].

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>
#include <limits>
#include <vector>

namespace {

struct Shape {
  int64_t group, head_size, block_size, kv_heads;
  int64_t block_stride, head_stride, value_offset;  // elements of a page
};

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {  // bfloat16
  union {
    uint32_t bits;
    float value;
  } wide{uint32_t(x) << 16};
  return wide.value;
}

// found[j] += sum over i of weights[i] * rows[i * stride + j], for a tile of N columns
// that stays in registers.
template <int N, typename T>
inline void add_tile(float* found, const float* weights, const T* rows, int64_t count,
                     int64_t stride) {
  float own[N];
  for (int j = 0; j < N; ++j) own[j] = found[j];
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < N; ++j) own[j] += weights[i] * widen(rows[i * stride + j]);
  for (int j = 0; j < N; ++j) found[j] = own[j];
}

template <typename T>
inline void add_rows(float* found, const float* weights, const T* rows, int64_t count,
                     int64_t columns) {
  int64_t j = 0;
  for (; j + 64 <= columns; j += 64)
    add_tile<64>(found + j, weights, rows + j, count, columns);
  for (; j + 16 <= columns; j += 16)
    add_tile<16>(found + j, weights, rows + j, count, columns);
  for (; j < columns; ++j) add_tile<1>(found + j, weights, rows + j, count, columns);
}

// Blocks [first, end) of one row and KV head; unnormalised values, their maximum
// logit and the sum of their weights for each query head of the group.
template <typename T, typename Scale>
void part(const Shape& shape, const T* cache, const int64_t* blocks, int64_t first,
          int64_t end, int64_t tokens, const float* query, const Scale* key_scale,
          const Scale* value_scale, int64_t head, float scale, float softcap,
          float* found, float* most, float* sum) {
  const int64_t D = shape.head_size, B = shape.block_size, G = shape.group;
  std::vector<float> logits(B), key_scales(B), value_scales(B);
  std::fill(found, found + G * D, 0.f);
  std::fill(most, most + G, std::numeric_limits<float>::lowest());
  std::fill(sum, sum + G, 0.f);
  for (int64_t block = first; block < end; ++block) {
    const T* page =
        cache + blocks[block] * shape.block_stride + head * shape.head_stride;
    const int64_t held = std::min(B, tokens - block * B);
    const int64_t offset = blocks[block] * B * shape.kv_heads + head;
    for (int64_t s = 0; s < held; ++s) {
      key_scales[s] = scale * float(key_scale[offset + s * shape.kv_heads]);
      value_scales[s] = float(value_scale[offset + s * shape.kv_heads]);
    }
    for (int64_t g = 0; g < G; ++g) {
      std::fill(logits.begin(), logits.end(), 0.f);
      add_rows(logits.data(), query + g * D, page, D, B);
      float top = most[g];
      for (int64_t s = 0; s < held; ++s) {
        logits[s] *= key_scales[s];
        if (softcap > 0) logits[s] = softcap * std::tanh(logits[s] / softcap);
        top = std::max(top, logits[s]);
      }
      const float shrink = std::exp(most[g] - top);
      most[g] = top;
      float total = 0.f;
      for (int64_t s = 0; s < held; ++s) {
        logits[s] = std::exp(logits[s] - top);
        total += logits[s];
        logits[s] *= value_scales[s];
      }
      sum[g] = sum[g] * shrink + total;
      float* own = found + g * D;
      if (shrink != 1.f)
        for (int64_t d = 0; d < D; ++d) own[d] *= shrink;
      add_rows(own, logits.data(), page + shape.value_offset, held, D);
    }
  }
}

template <typename T, typename Scale>
void attend(const Shape& shape, const T* cache, const int64_t* blocks,
            const int64_t* starts, const int64_t* lens, const float* query,
            const Scale* key_scale, const Scale* value_scale, float scale,
            float softcap, int64_t rows, int64_t splits, float* output) {
  const int64_t D = shape.head_size, G = shape.group, H = shape.kv_heads;
  std::vector<float> found(rows * H * splits * G * D), most(rows * H * splits * G),
      sum(rows * H * splits * G);
  at::parallel_for(0, rows * H * splits, 1, [&](int64_t from, int64_t to) {
    for (int64_t item = from; item < to; ++item) {
      const int64_t row = item / (H * splits), head = item / splits % H;
      const int64_t count = starts[row + 1] - starts[row], split = item % splits;
      part<T, Scale>(shape, cache, blocks + starts[row], count * split / splits,
                     count * (split + 1) / splits, lens[row],
                     query + (row * H + head) * G * D, key_scale, value_scale, head,
                     scale, softcap, found.data() + item * G * D,
                     most.data() + item * G, sum.data() + item * G);
    }
  });
  for (int64_t pair = 0; pair < rows * H; ++pair) {
    for (int64_t g = 0; g < G; ++g) {
      float top = std::numeric_limits<float>::lowest(), total = 0.f;
      for (int64_t i = pair * splits; i < (pair + 1) * splits; ++i)
        top = std::max(top, most[i * G + g]);
      float* own = output + (pair * G + g) * D;
      std::fill(own, own + D, 0.f);
      for (int64_t i = pair * splits; i < (pair + 1) * splits; ++i) {
        const float share = std::exp(most[i * G + g] - top);
        total += sum[i * G + g] * share;
        const float* values = found.data() + (i * G + g) * D;
        for (int64_t d = 0; d < D; ++d) own[d] += share * values[d];
      }
      for (int64_t d = 0; d < D; ++d) own[d] /= total;
    }
  }
}

template <typename T>
void by_scale(const Shape& shape, const T* cache, const torch::Tensor& blocks,
              const torch::Tensor& starts, const torch::Tensor& lens,
              const torch::Tensor& query, const torch::Tensor& scales, double scale,
              double softcap, torch::Tensor& output) {
  const int64_t rows = lens.numel();
  const int64_t wanted = 4 * at::get_num_threads(), pairs = rows * shape.kv_heads;
  const int64_t splits = std::max<int64_t>(1, (wanted + pairs - 1) / pairs);
  auto run = [&](auto* keys) {
    attend(shape, cache, blocks.data_ptr<int64_t>(), starts.data_ptr<int64_t>(),
           lens.data_ptr<int64_t>(), query.data_ptr<float>(), keys,
           keys + scales.stride(0), float(scale), float(softcap), rows, splits,
           output.data_ptr<float>());
  };
  if (scales.scalar_type() == torch::kHalf)
    run(scales.data_ptr<at::Half>());
  else
    run(scales.data_ptr<float>());
}

torch::Tensor attend_pages(const torch::Tensor& query, const torch::Tensor& cache,
                           const torch::Tensor& blocks, const torch::Tensor& starts,
                           const torch::Tensor& lens, const torch::Tensor& scales,
                           double scale, double softcap) {
  const int64_t kv_heads = cache.size(1), block_size = cache.size(2);
  const int64_t head_size = cache.size(3) / 2;
  const Shape shape{query.size(1) / kv_heads, head_size,       block_size, kv_heads,
                    cache.stride(0),          cache.stride(1), block_size * head_size};
  auto output = torch::empty_like(query);
  if (cache.scalar_type() == torch::kBFloat16)
    by_scale(shape, reinterpret_cast<const uint16_t*>(cache.data_ptr()), blocks, starts,
             lens, query, scales, scale, softcap, output);
  else
    by_scale(shape, cache.data_ptr<float>(), blocks, starts, lens, query, scales, scale,
             softcap, output);
  return output;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("attend_pages", &attend_pages);
}

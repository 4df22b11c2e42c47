// Kept tokens into pages of their own: the meaning is vllm_kvcompress/ops/compact.py.

#include "includes.h"

namespace {

// All tokens of a head are read before any is written: pages may be on both sides.
template <typename T>
void half(const Compact& call, int64_t head, const Order& order, std::vector<T>& held) {
  const int64_t D = call.head_size, B = call.block_size;
  T* cache = (T*)call.cache + head * call.head_step;
  const int64_t* kept = call.kept + head * call.tokens;
  held.resize(call.tokens * D);
  const auto element = [&](int64_t slot, int64_t d) {
    return order.offsets ? order.offsets[slot * D + d]
                         : order.first + slot * order.slot + d * order.element;
  };
  const bool vectors = !order.offsets && order.element == 1;
  for (int64_t i = 0; i < call.tokens; ++i) {
    const T* page = cache + call.source[kept[i] / B] * call.block_step;
    const int64_t slot = kept[i] % B;
    if (vectors)
      std::memcpy(&held[i * D], page + element(slot, 0), D * sizeof(T));
    else
      for (int64_t d = 0; d < D; ++d) held[i * D + d] = page[element(slot, d)];
  }
  for (int64_t first = 0; first < call.tokens; first += B) {
    T* page = cache + call.target[first / B] * call.block_step;
    const T* from = &held[first * D];
    if (vectors)
      for (int64_t s = 0; s < B; ++s)
        std::memcpy(page + element(s, 0), from + s * D, D * sizeof(T));
    else
      for (int64_t d = 0; d < D; ++d)
        for (int64_t s = 0; s < B; ++s) page[element(s, d)] = from[s * D + d];
  }
}

template <typename T>
void compact(const Compact& call) {
#pragma omp parallel for schedule(dynamic) if (call.kv_heads > 1)
  for (int64_t item = 0; item < 2 * call.kv_heads; ++item) {
    std::vector<T> held;
    half<T>(call, item / 2, item % 2 ? call.values : call.keys, held);
  }
}

}  // namespace

extern "C" void kvc_compact(const Compact& call) {
  switch (call.type_size) {
    case 1:
      return compact<uint8_t>(call);
    case 2:
      return compact<uint16_t>(call);
    default:
      return compact<uint32_t>(call);
  }
}

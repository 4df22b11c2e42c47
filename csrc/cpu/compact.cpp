// Kept tokens into pages of their own: the meaning is vllm_kvcompress/ops/compact.py.

#include "includes.h"

namespace {

// One half, keys or values, of what one KV head keeps. All is read before anything is
// written: pages may be on both sides.
template <typename T>
struct Half {
  const Compact& call;
  const Order& order;
  const int64_t* kept;
  T* cache;
  std::vector<T> held;

  Half(const Compact& call, const Order& order, int64_t head)
      : call(call),
        order(order),
        kept(call.kept + head * call.tokens),
        cache((T*)call.cache + head * call.head_step),
        held(call.tokens * call.head_size) {}

  int64_t offset(int64_t slot, int64_t d) const {
    return order.offset(slot, d, call.head_size);
  }

  // A token's elements are side by side.
  void move_tokens() {
    const int64_t D = call.head_size, B = call.block_size;
    for (int64_t i = 0; i < call.tokens; ++i) {
      const T* page = cache + call.source[kept[i] / B] * call.block_step;
      std::memcpy(&held[i * D], page + offset(kept[i] % B, 0), D * sizeof(T));
    }
    for (int64_t i = 0; i < call.tokens; ++i) {
      T* page = cache + call.target[i / B] * call.block_step;
      std::memcpy(page + offset(i % B, 0), &held[i * D], D * sizeof(T));
    }
  }

  // They are apart: pages are read element by element, from their start to their end.
  void move_elements() {
    const int64_t D = call.head_size, B = call.block_size, tokens = call.tokens;
    std::vector<int32_t> slots(B);
    for (int64_t first = 0, end; first < tokens; first = end) {
      const int64_t block = kept[first] / B;
      const T* page = cache + call.source[block] * call.block_step;
      for (end = first; end < tokens && kept[end] / B == block; ++end)
        slots[end - first] = kept[end] - block * B;
      T* to = &held[first];
      for (int64_t d = 0; d < D; ++d, to += tokens) {
        if (order.offsets) {
          for (int64_t i = 0; i < end - first; ++i) to[i] = page[offset(slots[i], d)];
        } else {
          const T* from = page + order.first + d * order.element;
          for (int64_t i = 0; i < end - first; ++i) to[i] = from[slots[i] * order.slot];
        }
      }
    }
    for (int64_t first = 0; first < tokens; first += B) {
      T* page = cache + call.target[first / B] * call.block_step;
      for (int64_t d = 0; d < D; ++d) {
        const T* from = &held[d * tokens + first];
        if (!order.offsets && order.slot == 1)
          std::memcpy(page + offset(0, d), from, B * sizeof(T));
        else
          for (int64_t s = 0; s < B; ++s) page[offset(s, d)] = from[s];
      }
    }
  }
};

template <typename T>
void compact(const Compact& call) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t item = 0; item < 2 * call.kv_heads; ++item) {
    const Order& order = item % 2 ? call.values : call.keys;
    Half<T> half(call, order, item / 2);
    if (!order.offsets && order.element == 1)
      half.move_tokens();
    else
      half.move_elements();
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

// Tiles of the tokens that one KV head of a request holds, for products.

template <typename T>
struct HeadPages {
  const T* cache;  // this head's part of block 0
  const int64_t* blocks;
  int64_t block_step, block_size, head_size, tokens;
  Order order;

  const T* page(int64_t token) const {
    return cache + blocks[token / block_size] * block_step;
  }

  // Whether vectors of tokens can be loaded from pages as they are.
  bool side_by_side() const {
    return !order.offsets && order.slot == 1 && block_size % LANES == 0;
  }

  // Columns of TILE tokens, where they lie. Behind the last token comes anything.
  KVC_INLINE void columns(int64_t token, Columns<T>& at) const {
    for (int v = 0; v < VECS; ++v) {
      const int64_t own = token + v * LANES < tokens ? token + v * LANES : token;
      at[v] = page(own) + order.first + own % block_size;
    }
  }

  // The same as [head_size, TILE] floats; zeros behind the last token.
  void copy(int64_t token, float* to) const {
    for (int64_t s = 0; s < TILE; ++s) {
      if (token + s >= tokens) {
        for (int64_t d = 0; d < head_size; ++d) to[d * TILE + s] = 0;
        continue;
      }
      const T* own = page(token + s);
      const int64_t slot = (token + s) % block_size;
      if (order.offsets) {
        const int32_t* offsets = order.offsets + slot * head_size;
        for (int64_t d = 0; d < head_size; ++d)
          to[d * TILE + s] = widen(own[offsets[d]]);
      } else {
        own += order.first + slot * order.slot;
        for (int64_t d = 0; d < head_size; ++d)
          to[d * TILE + s] = widen(own[d * order.element]);
      }
    }
  }
};

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

  const T* vector_of(int64_t token) const {
    return page(token) + order.first + token % block_size;
  }

  int64_t offset(int64_t slot, int64_t element) const {
    return order.offset(slot, element, head_size);
  }

  // One token as floats, `step` apart.
  void copy_token(int64_t token, float* to, int64_t step) const {
    const T* own = page(token);
    const int64_t slot = token % block_size;
    for (int64_t d = 0; d < head_size; ++d) to[d * step] = widen(own[offset(slot, d)]);
  }

  // Tokens [token, token + TILE) as [head_size, TILE]; anything behind the last one.
  void tile(int64_t token, float* to) const {
    if (side_by_side()) {
      for (int v = 0; v < VECS && token + v * LANES < tokens; ++v) {
        const T* from = vector_of(token + v * LANES);
        for (int64_t d = 0; d < head_size; ++d)
          store(to + d * TILE + v * LANES, load(from + d * order.element));
      }
      return;
    }
    for (int64_t s = 0; s < std::min(TILE, tokens - token); ++s)
      copy_token(token + s, to + s, TILE);
  }

  // The same as pairs of elements, [(head_size + 1) / 2, TILE].
  void tile(int64_t token, Pair* to) const {
    const int64_t even = head_size / 2 * 2;
    if (side_by_side()) {
      for (int v = 0; v < VECS && token + v * LANES < tokens; ++v) {
        const T* from = vector_of(token + v * LANES);
        Pair* own = to + v * LANES;
        for (int64_t d = 0; d < even; d += 2, own += TILE)
          store(own, load_bits(from + d * order.element) |
                         load_bits(from + (d + 1) * order.element) << 16);
        if (even < head_size) store(own, load_bits(from + even * order.element));
      }
      return;
    }
    for (int64_t s = 0; s < std::min(TILE, tokens - token); ++s) {
      const T* own = page(token + s);
      const int64_t slot = (token + s) % block_size;
      for (int64_t d = 0; d < head_size; d += 2) {
        const int32_t low = bits_of(own[offset(slot, d)]);
        const int32_t high = d < even ? bits_of(own[offset(slot, d + 1)]) : 0;
        to[d / 2 * TILE + s].bits = low | high << 16;
      }
    }
  }

  // A page as [head_size, block_size] floats.
  void page_by_element(int64_t number, float* to) const {
    for (int64_t s = 0; s < block_size; ++s)
      copy_token(number * block_size + s, to + s, block_size);
  }

  // The first tokens of a page as [count, head_size] floats.
  void page_by_token(int64_t number, int64_t count, float* to) const {
    for (int64_t s = 0; s < count; ++s)
      copy_token(number * block_size + s, to + s * head_size, 1);
  }
};

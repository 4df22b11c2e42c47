// Small matrix products whose result stays in registers.

constexpr int VECS = LANES == 16 ? 4 : 2;  // AVX-512 has twice as many registers
constexpr int64_t TILE = VECS * LANES;  // columns of a tile

// found[r][c] = sum over k of left[r * left_step + k] * right[k * right_step + c], for
// ROWS rows and COUNT vectors of columns.
template <int ROWS, int COUNT, typename Left, typename Right>
KVC_INLINE void product(const Left* left, int64_t left_step, const Right* right,
                        int64_t right_step, int64_t count, Vec (&found)[ROWS][COUNT]) {
  Vec own[ROWS][COUNT] = {};
  for (int64_t k = 0; k < count; ++k) {
    decltype(load(right)) column[COUNT];
    for (int v = 0; v < COUNT; ++v) column[v] = load(right + k * right_step + v * LANES);
    for (int r = 0; r < ROWS; ++r) {
      const auto factor = all(left[r * left_step + k]);
      for (int v = 0; v < COUNT; ++v) add_product(own[r][v], factor, column[v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < COUNT; ++v) found[r][v] = own[r][v];
}

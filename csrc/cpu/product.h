// Small matrix products whose result stays in registers.

constexpr int VECS = 4;
constexpr int64_t TILE = VECS * LANES;  // columns of a tile

// Where the columns of a tile are, a vector of them at a time.
template <typename T>
using Columns = const T* [VECS];

// found[r][c] = sum over k of left[r * left_step + k] * right[c] + k * right_step, for
// ROWS rows and TILE columns.
template <int ROWS, typename T>
KVC_INLINE void product(const float* left, int64_t left_step, const Columns<T>& right,
                        int64_t right_step, int64_t count, Vec (&found)[ROWS][VECS]) {
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECS; ++v) found[r][v] = Vec{};
  for (int64_t k = 0; k < count; ++k) {
    Vec column[VECS];
    for (int v = 0; v < VECS; ++v) column[v] = load(right[v] + k * right_step);
    for (int r = 0; r < ROWS; ++r) {
      const Vec factor = all(left[r * left_step + k]);
      for (int v = 0; v < VECS; ++v) found[r][v] += factor * column[v];
    }
  }
}

// Positions of the highest scores: the meaning is vllm_kvcompress/ops/select.py.

#include "includes.h"

namespace {

// Numbers in the order of scores: -0 equals 0, and NaN is the highest.
uint32_t rank(float score) {
  if (std::isnan(score)) return UINT32_MAX;
  uint32_t bits;
  score += 0.f;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

void select_row(const float* scores, int64_t tokens, int64_t count, int64_t* kept) {
  if (count == 0) return;
  std::vector<uint32_t> ranks(tokens), sorted;
  for (int64_t i = 0; i < tokens; ++i) ranks[i] = rank(scores[i]);
  sorted = ranks;
  const auto last = sorted.begin() + (count - 1);
  std::nth_element(sorted.begin(), last, sorted.end(), std::greater<uint32_t>());
  const uint32_t least = *last;
  // Of equal ones the first win.
  int64_t equal = count - std::count_if(sorted.begin(), last,
                                        [&](uint32_t x) { return x > least; });
  for (int64_t i = 0; i < tokens; ++i)
    if (ranks[i] > least || (ranks[i] == least && equal-- > 0)) *kept++ = i;
}

}  // namespace

extern "C" void kvc_select(const float* scores, int64_t rows, int64_t step,
                           int64_t tokens, int64_t count, int64_t* kept) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
  for (int64_t row = 0; row < rows; ++row)
    select_row(scores + row * step, tokens, count, kept + row * count);
}

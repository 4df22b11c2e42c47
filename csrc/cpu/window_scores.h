// Attention mass of the observation window: the meaning is
// vllm_kvcompress/ops/window_scores.py. Keys are read twice, once for each query's
// largest logit and sum of exponentials, once for the votes. Logits are to base 2.

struct Window {
  const int64_t* seen;  // [rows], tokens that it sees
  int64_t rows, units;  // of a query: its elements, or pairs of them
  float scale, softcap;
};

constexpr int ROWS = 6;         // of a product; its result fills the registers
constexpr int64_t CHUNK = 512;  // tokens that are one task

// Calls take(row, first token, logits) for N rows of a tile of keys.
template <int N, typename Unit, typename Take>
KVC_INLINE void rows_of_tile(const Window& window, const Unit* queries, int64_t row,
                             const Unit* keys, int64_t token, Take& take) {
  const int64_t units = window.units;
  Vec found[N][VECS];
  product<N, VECS>(queries + row * units, units, keys, TILE, units, found);
  for (int n = 0; n < N; ++n) {
    if (window.softcap > 0)
      for (int v = 0; v < VECS; ++v)
        found[n][v] =
            window.softcap * LOG2_E * tanh(found[n][v] * window.scale / window.softcap);
    else
      for (int v = 0; v < VECS; ++v) found[n][v] *= window.scale * LOG2_E;
    if (token + TILE > window.seen[row + n])
      for (int v = 0; v < VECS; ++v)
        for (int i = 0; i < LANES; ++i)
          if (token + v * LANES + i >= window.seen[row + n])
            found[n][v][i] = -std::numeric_limits<float>::infinity();
    take(row + n, token, found[n]);
  }
}

// The same for all rows and the tiles of a span of tokens.
template <typename T, typename Unit, typename Take>
KVC_INLINE void all_tiles(const Window& window, const Unit* queries,
                          const HeadPages<T>& pages, int64_t first, int64_t end,
                          Take& take) {
  std::vector<Unit> keys(window.units * TILE);
  for (int64_t token = first; token < end; token += TILE) {
    pages.tile(token, keys.data());
    int64_t row = 0;
    for (; row + ROWS <= window.rows; row += ROWS)
      rows_of_tile<ROWS>(window, queries, row, keys.data(), token, take);
    for (; row + 2 <= window.rows; row += 2)
      rows_of_tile<2>(window, queries, row, keys.data(), token, take);
    for (; row < window.rows; ++row)
      rows_of_tile<1>(window, queries, row, keys.data(), token, take);
  }
}

// Each row's largest logit and the sum of exponentials below it, over one chunk.
template <typename T, typename Unit>
void chunk_sums(const Window& window, const Unit* queries, const HeadPages<T>& pages,
                int64_t first, int64_t end, float* most, float* sums) {
  constexpr float lowest = std::numeric_limits<float>::lowest();
  std::vector<float> tops(window.rows * LANES, lowest), totals(window.rows * LANES);
  auto take = [&](int64_t row, int64_t, const Vec (&logits)[VECS]) {
    Vec top = load(&tops[row * LANES]), total = load(&totals[row * LANES]);
    Vec high = logits[0];
    for (int v = 1; v < VECS; ++v) high = larger(high, logits[v]);
    if (any_larger(high, top)) {
      high = larger(high, top);
      total *= power_of_2(top - high);
      store(&tops[row * LANES], top = high);
    }
    for (int v = 0; v < VECS; ++v) total += power_of_2(logits[v] - top);
    store(&totals[row * LANES], total);
  };
  all_tiles(window, queries, pages, first, end, take);
  for (int64_t row = 0; row < window.rows; ++row) {
    const Vec top = load(&tops[row * LANES]);
    most[row] = largest(top);
    sums[row] = sum(load(&totals[row * LANES]) * power_of_2(top - most[row]));
  }
}

// Votes for the tokens of one chunk, added to `scores`; a row's count for its share.
template <typename T, typename Unit>
void chunk_votes(const Window& window, const Unit* queries, const HeadPages<T>& pages,
                 int64_t first, int64_t end, const float* most, const float* shares,
                 float* scores) {
  std::vector<float> votes(CHUNK);
  auto take = [&](int64_t row, int64_t token, const Vec (&logits)[VECS]) {
    const Vec share = all(shares[row]);
    for (int v = 0; v < VECS; ++v) {
      float* own = &votes[token - first + v * LANES];
      store(own, load(own) + share * power_of_2(logits[v] - most[row]));
    }
  };
  all_tiles(window, queries, pages, first, end, take);
  std::copy(votes.begin(), votes.begin() + (end - first), scores + first);
}

template <typename T, typename Unit>
void scores_of(const WindowScores& call, const Unit* queries, int64_t units) {
  const Window window{call.seen, call.rows, units, call.scale, call.softcap};
  const int64_t rows = call.rows, chunks = (call.tokens + CHUNK - 1) / CHUNK;
  const int64_t tasks = call.kv_heads * chunks;
  std::vector<float> most(tasks * rows), sums(tasks * rows);
  std::vector<float> tops(call.kv_heads * rows), shares(call.kv_heads * rows);
  auto on_chunk = [&](int64_t task, auto&& run) {
    const int64_t head = task / chunks, first = task % chunks * CHUNK;
    const HeadPages<T> pages{(const T*)call.cache + head * call.head_step,
                             call.blocks + head * call.blocks_step,
                             call.block_step,
                             call.block_size,
                             call.head_size,
                             call.tokens,
                             call.order};
    run(head, queries + head * rows * units, pages, first,
        std::min(first + CHUNK, call.tokens));
  };
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task)
    on_chunk(task, [&](int64_t, const Unit* own, const HeadPages<T>& pages,
                       int64_t first, int64_t end) {
      chunk_sums(window, own, pages, first, end, &most[task * rows],
                 &sums[task * rows]);
    });
  for (int64_t head = 0; head < call.kv_heads; ++head)
    for (int64_t row = 0; row < rows; ++row) {
      float top = std::numeric_limits<float>::lowest(), total = 0;
      for (int64_t task = head * chunks; task < (head + 1) * chunks; ++task)
        top = std::max(top, most[task * rows + row]);
      for (int64_t task = head * chunks; task < (head + 1) * chunks; ++task)
        total += sums[task * rows + row] * std::exp2(most[task * rows + row] - top);
      tops[head * rows + row] = top;
      shares[head * rows + row] = total > 0 ? call.weights[row] / total : 0.f;
    }
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task)
    on_chunk(task, [&](int64_t head, const Unit* own, const HeadPages<T>& pages,
                       int64_t first, int64_t end) {
      chunk_votes(window, own, pages, first, end, &tops[head * rows],
                  &shares[head * rows], call.scores + head * call.tokens);
    });
}

#ifdef KVC_PAIRS
// Queries as pairs; none if one has more digits than keys have.
inline std::vector<Pair> paired(const WindowScores& call) {
  const int64_t D = call.head_size, units = (D + 1) / 2;
  std::vector<Pair> pairs(call.kv_heads * call.rows * units);
  for (int64_t i = 0; i < call.kv_heads * call.rows * D; ++i) {
    uint32_t bits;
    std::memcpy(&bits, call.queries + i, sizeof(bits));
    if (bits & 0xffff) return {};
    pairs[i / D * units + i % D / 2].bits |= i % D % 2 ? bits : bits >> 16;
  }
  return pairs;
}
#endif

template <typename T>
void window_scores(const WindowScores& call) {
#ifdef KVC_PAIRS
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Float8>) {
    const std::vector<Pair> pairs = paired(call);
    if (!pairs.empty())
      return scores_of<T>(call, pairs.data(), (call.head_size + 1) / 2);
  }
#endif
  scores_of<T>(call, call.queries, call.head_size);
}

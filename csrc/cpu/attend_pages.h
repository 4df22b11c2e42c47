// Attention of one new token per row over pages with factors: the meaning is
// vllm_kvcompress/ops/attend_pages.py. All query heads of a KV head read a page at once.

// What some blocks of one row and KV head give each query head: values not yet divided
// by the sum of their weights, that sum, and the logit that weights are relative to.
struct Part {
  std::vector<float> found, most, sums;
  Part(int64_t group, int64_t head_size)
      : found(group * head_size),
        most(group, std::numeric_limits<float>::lowest()),
        sums(group) {}
};

// found[r][c] += left[r] * right[.][c], for ROWS rows and COLUMNS vectors of columns.
template <int ROWS, int COLUMNS, typename T>
KVC_INLINE void add_columns(const float* left, int64_t left_step, const T* right,
                            int64_t right_step, int64_t count, float* found,
                            int64_t found_step) {
  Vec own[ROWS][COLUMNS];
  product<ROWS, COLUMNS>(left, left_step, right, right_step, count, own);
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < COLUMNS; ++v) {
      float* at = found + r * found_step + v * LANES;
      store(at, load(at) + own[r][v]);
    }
}

template <int ROWS, typename T>
KVC_INLINE void add_rows(const float* left, int64_t left_step, const T* right,
                         int64_t right_step, int64_t count, float* found,
                         int64_t columns) {
  int64_t c = 0;
  for (; c + TILE <= columns; c += TILE)
    add_columns<ROWS, VECS>(left, left_step, right + c, right_step, count, found + c,
                            columns);
  for (; c + LANES <= columns; c += LANES)
    add_columns<ROWS, 1>(left, left_step, right + c, right_step, count, found + c,
                         columns);
  for (; c < columns; ++c)
    for (int r = 0; r < ROWS; ++r)
      for (int64_t k = 0; k < count; ++k)
        found[r * columns + c] += left[r * left_step + k] * widen(right[k * right_step + c]);
}

// found[r][c] += sum over k of left[r][k] * right[k][c], with `rows` rows.
template <typename T>
void add_products(const float* left, int64_t left_step, const T* right,
                 int64_t right_step, int64_t count, float* found, int64_t columns,
                 int64_t rows) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    add_rows<4>(left + r * left_step, left_step, right, right_step, count,
                found + r * columns, columns);
  for (; r < rows; ++r)
    add_rows<1>(left + r * left_step, left_step, right, right_step, count,
                found + r * columns, columns);
}

struct Scratch {
  std::vector<float> logits, copy, key_scales, value_scales;
};

template <typename T>
void attend_block(const AttendPages& call, const HeadPages<T>& keys,
                  const HeadPages<T>& values, const float* query, int64_t block,
                  Scratch& scratch, Part& part) {
  const int64_t G = call.group, D = call.head_size, B = call.block_size;
  const int64_t held = std::min(B, keys.tokens - block * B);
  float* logits = scratch.logits.data();
  std::fill_n(logits, G * B, 0.f);
  if (keys.order.offsets || keys.order.slot != 1) {
    keys.page_by_element(block, scratch.copy.data());
    add_products(query, D, scratch.copy.data(), B, D, logits, B, G);
  } else {
    add_products(query, D, keys.page(block * B) + keys.order.first, keys.order.element, D,
                logits, B, G);
  }
  for (int64_t g = 0; g < G; ++g) {
    float* own = logits + g * B;
    float top = part.most[g];
    for (int64_t s = 0; s < held; ++s) own[s] *= scratch.key_scales[s];
    if (call.softcap > 0)
      for (int64_t s = 0; s < held; ++s)
        own[s] = call.softcap * std::tanh(own[s] / call.softcap);
    for (int64_t s = 0; s < held; ++s) top = std::max(top, own[s]);
    const float shrink = std::exp(part.most[g] - top);
    part.most[g] = top;
    std::fill(own + held, own + B, -std::numeric_limits<float>::infinity());
    float total = 0;
    int64_t s = 0;
    for (; s + LANES <= B; s += LANES) {
      const Vec weights = exp_of_negative(load(own + s) - top);
      total += sum(weights);
      store(own + s, weights * load(&scratch.value_scales[s]));
    }
    for (; s < B; ++s) {
      const float weight = std::exp(own[s] - top);
      total += weight;
      own[s] = weight * scratch.value_scales[s];
    }
    part.sums[g] = part.sums[g] * shrink + total;
    if (shrink != 1.f)
      for (int64_t d = 0; d < D; ++d) part.found[g * D + d] *= shrink;
  }
  if (values.order.offsets || values.order.element != 1) {
    values.page_by_token(block, held, scratch.copy.data());
    add_products(logits, B, scratch.copy.data(), D, held, part.found.data(), D, G);
  } else {
    add_products(logits, B, values.page(block * B) + values.order.first,
                values.order.slot, held, part.found.data(), D, G);
  }
}

template <typename T, typename Scale>
void attend_some(const AttendPages& call, int64_t row, int64_t head, int64_t first,
                 int64_t end, Part& part) {
  const int64_t B = call.block_size, H = call.kv_heads;
  const T* cache = (const T*)call.cache + head * call.head_step;
  const int64_t* blocks = call.blocks + call.starts[row];
  const auto pages = [&](const Order& order) {
    return HeadPages<T>{cache,          blocks,         call.block_step, B,
                        call.head_size, call.lens[row], order};
  };
  const HeadPages<T> keys = pages(call.keys), values = pages(call.values);
  const float* query = call.query + (row * H + head) * call.group * call.head_size;
  Scratch scratch{std::vector<float>(call.group * B),
                  std::vector<float>(call.head_size * B), std::vector<float>(B),
                  std::vector<float>(B)};
  const Scale* key_scale = (const Scale*)call.scales + head;
  const Scale* value_scale = key_scale + call.scales_step;
  for (int64_t block = first; block < end; ++block) {
    for (int64_t s = 0; s < B; ++s) {
      const int64_t at = (blocks[block] * B + s) * H;
      scratch.key_scales[s] = call.scale * float(key_scale[at]);
      scratch.value_scales[s] = float(value_scale[at]);
    }
    attend_block(call, keys, values, query, block, scratch, part);
  }
}

// Rows with few KV heads are split, so that all threads have work.
template <typename T, typename Scale>
void attend_rows(const AttendPages& call) {
  const int64_t G = call.group, D = call.head_size, pairs = call.rows * call.kv_heads;
  const int64_t splits = std::max<int64_t>(1, (call.tasks + pairs - 1) / pairs);
  std::vector<Part> parts(pairs * splits, Part(G, D));
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < pairs * splits; ++task) {
    const int64_t row = task / splits / call.kv_heads, split = task % splits;
    const int64_t count = call.starts[row + 1] - call.starts[row];
    attend_some<T, Scale>(call, row, task / splits % call.kv_heads,
                          count * split / splits, count * (split + 1) / splits,
                          parts[task]);
  }
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t g = 0; g < G; ++g) {
      const Part* own = &parts[pair * splits];
      float top = std::numeric_limits<float>::lowest(), total = 0;
      for (int64_t i = 0; i < splits; ++i) top = std::max(top, own[i].most[g]);
      float* output = call.output + (pair * G + g) * D;
      std::fill_n(output, D, 0.f);
      for (int64_t i = 0; i < splits; ++i) {
        const float share = std::exp(own[i].most[g] - top);
        total += own[i].sums[g] * share;
        for (int64_t d = 0; d < D; ++d) output[d] += share * own[i].found[g * D + d];
      }
      for (int64_t d = 0; d < D; ++d) output[d] /= total;
    }
}

template <typename T>
void attend_pages(const AttendPages& call) {
  if (call.half_scales)
    attend_rows<T, _Float16>(call);
  else
    attend_rows<T, float>(call);
}

// The consumers of attention_sm90.cuh: products, softmax, the result, and the kernel itself.
#pragma once

namespace slimkernels {

// A consumer thread holds, of two rows (its first and the one 8 below), every fourth pair of
// columns. Four neighbouring lanes, a quad, have a row together. wgmma.cuh says which element is
// where.
struct SoftmaxRows {
  float max[2] = {-INFINITY, -INFINITY};  // of scores without their scale
  float sum[2] = {0.f, 0.f};              // this thread's part
};

__device__ inline int row_of_element(int i) { return i % 4 / 2; }

__device__ inline float quad_max(float x) { return warp_reduce(x, combine_max, 4); }
__device__ inline float quad_sum(float x) { return warp_reduce(x, combine_sum, 4); }

template <typename T>
__device__ uint32_t pack_pair(float low, float high) {
  const T pair[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

// tanh to about 2e-7: near 0 by its series, since 1 - 2 / (e^2x + 1) cancels there.
__device__ inline float tanh_of(float x) {
  const float square = x * x;
  const float series =
      x * (1.f + square * (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315))));
  const float exact = 1.f - 2.f * reciprocal_approximate(1.f + exp2_approximate(2 * kLog2E * x));
  return fabsf(x) < 0.2f ? series : exact;
}

template <int kCount>
__device__ void cap_scores(float (&s)[kCount], float scale, float softcap) {
  const float inner = scale / softcap;
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = softcap * tanh_of(s[i] * inner);
}

// `keys` are those that the two rows see, counted from this thread's first column.
template <int kCount>
__device__ void hide_scores(float (&s)[kCount], const KeyRange (&keys)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = i / 4 * 8 + i % 2;
    const KeyRange& seen = keys[row_of_element(i)];
    if (column < seen.first || column >= seen.end) s[i] = -INFINITY;
  }
}

// Scores become exp2(factor * (score - max)); `shrink` is what the rows' earlier sums are worth.
template <int kCount>
__device__ void softmax_step(float (&s)[kCount], SoftmaxRows& rows, float factor,
                             float (&shrink)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float max = rows.max[r];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (row_of_element(i) == r) max = fmaxf(max, s[i]);
    max = quad_max(max);
    // A row that has seen nothing: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
    const float shift = max == -INFINITY ? 0.f : max * factor;
    shrink[r] = exp2_approximate(fmaf(rows.max[r], factor, -shift));
    rows.max[r] = max;
    float sum = rows.sum[r] * shrink[r];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (row_of_element(i) == r) {
        s[i] = exp2_approximate(fmaf(s[i], factor, -shift));
        sum += s[i];
      }
    rows.sum[r] = sum;
  }
}

// The four 32-bit words of each lane of a quad, transposed: lane n gets everyone's n-th.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t &low = words[i], &high = words[i + step];
      const uint32_t received = __shfl_xor_sync(kWholeWarp, upper ? low : high, step);
      (upper ? low : high) = received;
    }
  }
}

// Row r of a thread's two, times `factor`, 16 bytes a thread: the quad's threads swap their pairs
// of columns. Whole quads come here.
template <typename T, int kCount>
__device__ void store_row(T* row, int columns, const float (&o)[kCount], int r, float factor,
                          bool is_present) {
#pragma unroll
  for (int first = 0; first < 2 * kCount; first += 32) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = (first / 8 + j) * 4 + 2 * r;
      words[j] = pack_pair<T>(o[i] * factor, o[i + 1] * factor);
    }
    transpose_quad(words);
    const int column = first + threadIdx.x % 4 * 8;
    if (is_present && column < columns)
      *reinterpret_cast<uint4*>(row + column) = uint4{words[0], words[1], words[2], words[3]};
  }
}

// One consumer warpgroup's.
template <typename Tile>
struct AttentionConsumer {
  using T = typename Tile::T;
  static constexpr int kScores = Tile::kN / 2, kOutputs = Tile::kWidth / 2;  // a thread's
  static constexpr int kSteps = Tile::kN / 16;                               // of p @ v

  const AttentionArguments& arguments;
  int group;  // among the consumers
  AttentionShared<Tile> shared;
  RingPlace k_place, v_place;
  uint32_t q_parity = 0;

  __device__ int lane() const { return threadIdx.x % 32; }
  // Of this thread's first row, in the tile of queries.
  __device__ int row() const {
    return group * 64 + threadIdx.x % kWarpGroup / 32 * 16 + lane() / 4;
  }

  // Turns at the tensor cores: barrier 1 + g is where group g waits for the one before it.
  __device__ void wait_turn() { named_barrier_sync(1 + group, 2 * kWarpGroup); }
  __device__ void pass_turn() {
    named_barrier_arrive(1 + (group + 1) % Tile::kGroups, 2 * kWarpGroup);
  }

  // By each warp, since a warp that is done knows nothing of the others.
  __device__ void release(Mbarrier* barrier) {
    if (lane() == 0) mbarrier_arrive(barrier);
  }

  __device__ void wait_keys() {
    mbarrier_wait(&shared.barriers().k_full[k_place.stage(Tile::kStages)],
                  k_place.parity(Tile::kStages));
  }
  __device__ void wait_values() {
    mbarrier_wait(&shared.barriers().v_full[v_place.stage(Tile::kStages)],
                  v_place.parity(Tile::kStages));
  }
  __device__ void free_keys(bool and_queries) {
    release(&shared.barriers().k_empty[k_place.stage(Tile::kStages)]);
    ++k_place.passed;
    if (and_queries) release(&shared.barriers().q_empty);
  }
  __device__ void free_values() {
    release(&shared.barriers().v_empty[v_place.stage(Tile::kStages)]);
    ++v_place.passed;
  }

  __device__ void issue_scores(float (&s)[kScores]) {
    const uint32_t q = shared_address(shared.q()),
                   k = shared_address(shared.k(k_place.stage(Tile::kStages)));
#pragma unroll
    for (int d = 0; d < Tile::kWidth; d += 16)
      wgmma<T, kK, kK>(s, operand_k(q, Tile::kM, group * 64, d), operand_k(k, Tile::kN, 0, d),
                       d > 0);
    wgmma_commit();
  }

  __device__ void issue_outputs(float (&o)[kOutputs], const uint32_t (&p)[kSteps][4]) {
    const uint32_t v = shared_address(shared.v(v_place.stage(Tile::kStages)));
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      wgmma<T, kMN>(o, p[step], operand_mn(v, Tile::kN, 0, step * 16), true);
    wgmma_commit();
  }

  // From products to probabilities.
  __device__ void probabilities(float (&s)[kScores], SoftmaxRows& rows, const AttentionWork& work,
                                int tile, float (&shrink)[2]) {
    const AttentionShape& shape = arguments.shape;
    float factor = arguments.scale * kLog2E;
    if (arguments.softcap > 0) {
      cap_scores(s, arguments.scale, arguments.softcap);
      factor = kLog2E;
    }
    const int first = work.tile.first;
    if (is_edge(shape, work.place, first + group * 64, 64, tile, Tile::kN)) {
      KeyRange keys[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        keys[r] = keys_of_query(shape, work.place, first + row() + 8 * r);
        keys[r].first -= tile * Tile::kN + lane() % 4 * 2;
        keys[r].end -= tile * Tile::kN + lane() % 4 * 2;
      }
      hide_scores(s, keys);
    }
    softmax_step(s, rows, factor, shrink);
  }

  __device__ void pack(uint32_t (&p)[kSteps][4], const float (&s)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i / 4][i % 4] = pack_pair<T>(s[2 * i], s[2 * i + 1]);
  }

  // p of the last key tile.
  __device__ void start(uint32_t (&p)[kSteps][4], SoftmaxRows& rows, const AttentionWork& work) {
    float s[kScores], shrink[2];
    const int tile = work.keys.end - 1;
    mbarrier_wait(&shared.barriers().q_full, q_parity);
    q_parity ^= 1;
    wait_keys();
    wgmma_fence();
    issue_scores(s);
    wgmma_wait<0>();
    fence_registers(s);
    free_keys(tile == work.keys.begin);
    probabilities(s, rows, work, tile, shrink);
    pack(p, s);
    if (tile > work.keys.begin) wait_keys();
  }

  // The scores of `tile` and, from p, the outputs of the tile after it; then p of `tile`.
  __device__ void step(float (&o)[kOutputs], uint32_t (&p)[kSteps][4], SoftmaxRows& rows,
                       const AttentionWork& work, int tile) {
    float s[kScores], shrink[2];
    const bool is_last = tile == work.keys.begin;
    wait_turn();
    wgmma_fence();
    issue_scores(s);
    wait_values();
    wgmma_fence();
    issue_outputs(o, p);
    pass_turn();
    wgmma_wait<1>();
    fence_registers(s);
    free_keys(is_last);
    probabilities(s, rows, work, tile, shrink);
    fence_registers(s);
    // For the next step, but here: without a branch before the wait, ptxas would move the wait up,
    // and no exponential would run under the products.
    if (!is_last) wait_keys();
    wgmma_wait<0>();
    fence_registers(o);
    fence_registers(p);
    free_values();
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= shrink[row_of_element(i)];
    pack(p, s);
  }

  __device__ void attend(float (&o)[kOutputs], SoftmaxRows& rows, const AttentionWork& work) {
    uint32_t p[kSteps][4];
    start(p, rows, work);
    for (int tile = work.keys.end - 2; tile >= work.keys.begin; --tile)
      step(o, p, rows, work, tile);
    wait_values();
    wgmma_fence();
    issue_outputs(o, p);
    wgmma_wait<0>();
    fence_registers(o);
    free_values();
  }

  __device__ void store(const float (&o)[kOutputs], const SoftmaxRows& rows,
                        const AttentionWork& work) {
    const AttentionShape& shape = arguments.shape;
    const bool is_ragged = shape.cu_seqlens_q != nullptr;
    const int64_t plane = int64_t(work.place.batch) * shape.heads + work.tile.head;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = row() + 8 * r;
      const int64_t token = work.place.q_begin + work.tile.first + i;
      const bool is_present = i < work.count;
      const float sum = quad_sum(rows.sum[r]);
      const bool is_empty = sum == 0.f;  // no key, or only scores of -inf
      const float log = is_empty ? 0.f : logf(sum);
      if (is_present && lane() % 4 == 0) {
        const float peak = rows.max[r] * (arguments.softcap > 0 ? 1.f : arguments.scale);
        const float lse = is_empty ? -INFINITY : peak + log;
        const int64_t at = plane * shape.Tq + token;
        arguments.lse[at] = lse;
        arguments.low[at] = is_empty ? 0.f : log - (lse - peak);
      }
      const int64_t y_row =
          is_ragged ? token * shape.heads + work.tile.head : plane * shape.Tq + token;
      store_row(static_cast<T*>(arguments.y) + y_row * arguments.value_width, arguments.value_width,
                o, r, is_empty ? 0.f : 1.f / sum, is_present);
    }
  }

  __device__ void operator()(const AttentionWork& work) {
    float o[kOutputs] = {};
    SoftmaxRows rows;
    if (work.keys.begin < work.keys.end) attend(o, rows, work);
    store(o, rows, work);
  }
};

template <typename Tile>
__device__ void init_attention_barriers(AttentionBarriers& barriers) {
  constexpr int kConsumerWarps = 4 * Tile::kGroups;
  mbarrier_init(&barriers.q_full, 1);
  mbarrier_init(&barriers.q_empty, kConsumerWarps);
  mbarrier_init(&barriers.tail, 1);
  for (int stage = 0; stage < Tile::kStages; ++stage) {
    mbarrier_init(&barriers.k_full[stage], 1);
    mbarrier_init(&barriers.v_full[stage], 1);
    mbarrier_init(&barriers.k_empty[stage], kConsumerWarps);
    mbarrier_init(&barriers.v_empty[stage], kConsumerWarps);
  }
  fence_mbarrier_init();
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_forward_kernel(const __grid_constant__ TensorMap q_map,
                                  const __grid_constant__ TensorMap k_map,
                                  const __grid_constant__ TensorMap v_map,
                                  const __grid_constant__ AttentionArguments arguments) {
#ifdef SLIM_HOPPER
  const AttentionShared<Tile> shared;
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&q_map, &k_map, &v_map}) prefetch_map(map);
    init_attention_barriers<Tile>(shared.barriers());
  }
  __syncthreads();
  if (threadIdx.x < kWarpGroup) {
    registers_shrink<Tile::kProducerRegisters>();
    if (threadIdx.x < 32) {
      AttentionProducer<Tile> produce{arguments, &q_map, &k_map, &v_map, shared};
      each_attention_work<Tile>(arguments, produce);
    }
  } else {
    registers_grow<Tile::kConsumerRegisters>();
    AttentionConsumer<Tile> consume{arguments, int(threadIdx.x / kWarpGroup) - 1, shared};
    // The first turn is group 0's; at the end it takes the turn that is left.
    if (consume.group == Tile::kGroups - 1) consume.pass_turn();
    each_attention_work<Tile>(arguments, consume);
    if (consume.group == 0) consume.wait_turn();
  }
#else
  __trap();
#endif
}

}  // namespace slimkernels

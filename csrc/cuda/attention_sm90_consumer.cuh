// The consumers of attention_sm90.cuh: products, softmax, the result, and the kernel itself.
#pragma once

namespace slimkernels {

// Of a consumer thread's two rows.
struct SoftmaxRows {
  float max[2] = {-INFINITY, -INFINITY};  // of scores without their scale
  float sum[2] = {0.f, 0.f};              // this thread's part
};

__device__ inline float quad_max(float x) { return warp_reduce(x, combine_max, 4); }
__device__ inline float quad_sum(float x) { return warp_reduce(x, combine_sum, 4); }

template <int kCount>
__device__ void cap_scores(float (&s)[kCount], float scale, float softcap) {
  const float inner = scale / softcap;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float x = s[i] * inner;
    s[i] = softcap * tanh_of(x, tanh_gap(x));
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
    const float peak = max == -INFINITY ? 0.f : max, shift = peak * factor;
    // 1 while the maximum stays: as fmaf(rows.max[r], factor, -shift) it would be off by shift's
    // rounding, in the same direction at every tile.
    shrink[r] = exp2_approximate((rows.max[r] - peak) * factor);
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

  // Of this thread's two, in the tile.
  __device__ int row(int r) const { return group * 64 + first_row() + 8 * r; }

  // Turns at the tensor cores: barrier 1 + g is where group g waits for the one before it.
  __device__ void wait_turn() { named_barrier_sync(1 + group, 2 * kWarpGroup); }
  __device__ void pass_turn() {
    named_barrier_arrive(1 + (group + 1) % Tile::kGroups, 2 * kWarpGroup);
  }

  __device__ void wait_keys() { shared.barriers().k.wait_full(k_place); }
  __device__ void wait_values() { shared.barriers().v.wait_full(v_place); }
  __device__ void free_keys(bool and_queries) {
    release(&shared.barriers().k.empty[k_place.stage(Tile::kStages)]);
    ++k_place.passed;
    if (and_queries) release(&shared.barriers().q_empty);
  }
  __device__ void free_values() {
    release(&shared.barriers().v.empty[v_place.stage(Tile::kStages)]);
    ++v_place.passed;
  }

  __device__ void issue_scores(float (&s)[kScores]) {
    issue_transposed<T, Tile::kWidth>(s, shared_address(shared.q()), Tile::kM, group * 64,
                                      shared_address(shared.k(k_place.stage(Tile::kStages))));
  }

  __device__ void issue_outputs(float (&o)[kOutputs], const uint32_t (&p)[kSteps][4]) {
    issue_added<T>(o, p, shared_address(shared.v(v_place.stage(Tile::kStages))));
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
    const int packed = arguments.packed;
    const int first = work.tile.first + group * 64 / packed;
    const int end = work.tile.first + (group * 64 + 63) / packed + 1;
    if (is_edge(shape, work.place, first, end - first, tile, Tile::kN)) {
      const int tokens[2] = {work.tile.first + row(0) / packed, work.tile.first + row(1) / packed};
      each_hidden<kScores>(shape, work.place, tokens, tile, [&](int i) { s[i] = -INFINITY; });
    }
    softmax_step(s, rows, factor, shrink);
  }

  __device__ void pack(uint32_t (&p)[kSteps][4], const float (&s)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i)
      p[i / 4][i % 4] = narrow_pair(s[2 * i], s[2 * i + 1], T{});
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
    const int heads = shape.heads * arguments.packed, batch = work.place.batch;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowQuery query = query_of_row(work.tile, arguments.packed, row(r));
      const bool is_present = row(r) < work.count * arguments.packed;
      const int64_t token = work.place.q_begin + query.token;
      const float sum = quad_sum(rows.sum[r]);
      const bool is_empty = sum == 0.f;  // no key, or only scores of -inf
      const float log = is_empty ? 0.f : logf(sum);
      if (is_present && first_column() == 0) {
        const float peak = rows.max[r] * (arguments.softcap > 0 ? 1.f : arguments.scale);
        const float lse = is_empty ? -INFINITY : peak + log;
        const int64_t at = (int64_t(batch) * heads + query.head) * shape.Tq + token;
        arguments.lse[at] = lse;
        arguments.low[at] = is_empty ? 0.f : log - (lse - peak);
      }
      T* const y = static_cast<T*>(arguments.y) +
                   row_of(shape, heads, batch, query.head, token) * arguments.value_width;
      store_row(y, arguments.value_width, o, r, is_empty ? 0.f : 1.f / sum, is_present);
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
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_forward_kernel(const __grid_constant__ TensorMap q_map,
                                  const __grid_constant__ TensorMap k_map,
                                  const __grid_constant__ TensorMap v_map,
                                  const __grid_constant__ AttentionArguments arguments) {
#ifdef SLIM_HOPPER
  const AttentionShared<Tile> shared;
  set_up(shared.barriers(), q_map, k_map, v_map);
  in_roles<Tile>(
      [&] {
        AttentionProducer<Tile> produce{arguments, &q_map, &k_map, &v_map, shared};
        each_attention_work<Tile>(arguments, produce);
      },
      [&](int group) {
        AttentionConsumer<Tile> consume{arguments, group, shared};
        // The first turn is group 0's; at the end it takes the turn that is left.
        if (group == Tile::kGroups - 1) consume.pass_turn();
        each_attention_work<Tile>(arguments, consume);
        if (group == 0) consume.wait_turn();
      });
#else
  __trap();
#endif
}

}  // namespace slimkernels

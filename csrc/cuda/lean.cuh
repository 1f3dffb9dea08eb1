// The lean row kernels (sm_90 on): a row of logits, and its target's, is read once, kept in the registers of a cluster
// of 1 to 16 blocks, and its gradient is written once. Formulas at the head of row_work.cuh. Device memory traffic a
// logit: b + t + o (the bytes of a logit, of its target's, of the gradient), for any divergence.
//
// Clusters are persistent: each works on many rows. A block's shared memory is a ring of stages, each for the block's
// part of a row, filled by bulk copies up to three rows ahead; a stage is filled again as soon as its row is in
// registers. For a row the blocks meet once: every block tells every other what it found (Part), by asynchronous stores
// that an mbarrier of the receiver counts. All blocks have then read the row: the gradient may be written over it. A
// divergence whose sum g needs the log-sum-exps makes them meet once more; the value of the others is summed with the
// gradient and travels with the next row's Part.
//
// Two turns of mbarriers and places are enough. A block tells of meeting e + 2 after it has heard of e + 1 from every
// block; each told that after a barrier that its threads reached when they had read what was told at e.
//
// Every choice but divergence and columns a thread is a branch that is the same for all threads and stands outside of
// the loops over the registers. Internal to each translation unit that includes it.
#pragma once

#include "lean_loops.cuh"

namespace dft::cuda {
namespace {

#if defined(DFT_CUDA_ON_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The rows of one cluster, in one of its blocks
template <class D, int Columns>
struct LeanRows : LeanLoops<D, Columns> {
  using Base = LeanLoops<D, Columns>;
  using Base::a;
  using Base::first;
  using Base::plan;
  using Base::inside;
  static constexpr bool present = Base::present;
  static constexpr bool early = D::flat || D::linear;  // the divergence's value is summed with the gradient

  Workspace& shared;
  unsigned meetings;  // so far

  __device__ __forceinline__ LeanRows(const RowArguments& arguments, const Plan& parts)
      : Base(arguments, parts, int(cluster_rank()) * parts.part),
        shared(*reinterpret_cast<Workspace*>(arena())),
        meetings(0) {}

  __device__ __forceinline__ char* stage_at(int stage) const {
    return arena() + kLeanWorkspace + stage * plan.stage_bytes;
  }

  // By one thread: starts the copies of this block's part of a row
  __device__ __forceinline__ void fetch(int stage, int row) const {
    if (row >= a.rows) return;
    Arrival* full = &shared.full[stage];
    const int columns = (inside + 7) / 8 * 8, size = bytes_of(a.logits.element);
    const int target_size = present ? bytes_of(a.target.element) : 0;
    arrival_expect(full, uint32_t(columns * (size + target_size)));
    bulk_load(stage_at(stage),
              static_cast<const char*>(a.logits.data) + (int64_t(row) * a.logits.stride + first) * size,
              uint32_t(columns * size), full);
    if constexpr (present)
      bulk_load(stage_at(stage) + plan.part * size,
                static_cast<const char*>(a.target.data) + (int64_t(row) * a.target.stride + first) * target_size,
                uint32_t(columns * target_size), full);
  }

  // A meeting of the cluster: what all of its warps say, joined. then(): called when all threads of the block are there
  template <class X, class Then>
  __device__ __forceinline__ X meet(const X& mine, X (&warps)[kLeanWarps], X (&slots)[2][kMostBlocks], Then then) {
    const int lane = int(threadIdx.x % 32), place = lane % 16, turn = int(meetings & 1);
    if (lane == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    then();
    if (threadIdx.x < 32) {
      X block = place < kLeanWarps ? warps[place] : X::none();
      this->join(block);
      if (lane == 0) arrival_expect(&shared.met[turn], uint32_t(plan.blocks * sizeof(X)));
      if (lane < plan.blocks) send(&slots[turn][cluster_rank()], unsigned(lane), block, &shared.met[turn]);
    }
    arrival_wait(&shared.met[turn], meetings / 2 & 1);
    X all = place < plan.blocks ? slots[turn][place] : X::none();
    this->join(all);
    meetings++;
    return all;
  }

  __device__ __forceinline__ void put(int row, int which, float value) const {
    if (first == 0 && threadIdx.x == 0) static_cast<float*>(a.statistics)[which * a.statistics_stride + row] = value;
  }

  // Writes the statistics that need no probability of a column.
  __device__ __forceinline__ Known<float> settle(const Part& all, int row, int64_t label, bool valid) const {
    const auto& sums = all.s.sums;
    Known<float> known = {};
    if (plan.one) {
      known.one.set(all.s.top, sums[kTotal]);
      put(row, kLse, known.one.lse);
      put(row, kLseLow, known.one.low);
    }
    if (a.wanted & kLogProbBit) put(row, kLogProb, valid ? known.one.of(all.z_y) : NAN);
    if (a.wanted & kMeanBit) put(row, kMeanLogProb, known.one.of(sums[kMean] / float(a.vocab)));
    if (a.wanted & kEntropyBit)
      put(row, kEntropy, known.entropy = std::log(sums[kTotal]) - sums[kEntropySum] / sums[kTotal]);
    const int best = all.s.best == INT_MAX ? 0 : all.s.best;
    if (a.wanted & kCorrectBit) put(row, kCorrect, float(best == label));
    if (a.wanted & (kCorrectBit | kAgreementBit)) put(row, kTop, all.s.top);
    if constexpr (present) {
      const int target_best = all.s.target_best == INT_MAX ? 0 : all.s.target_best;
      if (a.wanted & kAgreementBit) {
        put(row, kAgreement, float(best == target_best));
        put(row, kTargetTop, all.s.target_top);
      }
      known.target.set(all.s.target_top * plan.target_inverse, sums[kTargetTotal]);
      known.soft = known.one;
      if (!plan.same) known.soft.set(all.s.top * plan.inverse, sums[kSoftTotal]);
      if (D::linear)
        known.slope = (sums[kJoint] / (plan.same ? sums[kTotal] : sums[kSoftTotal]) -
                       (known.soft.lse - known.target.lse)) -
                      (known.soft.low - known.target.low);
      put(row, kSoftLse, known.soft.lse);
      put(row, kSoftLseLow, known.soft.low);
      put(row, kTargetLse, known.target.lse);
      put(row, kTargetLseLow, known.target.low);
    }
    return known;
  }

  __device__ __forceinline__ void run() {
    const int clusters = int(gridDim.x) / plan.blocks, from = int(blockIdx.x) / plan.blocks, rows = int(a.rows);
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < plan.stages; stage++) arrival_init(&shared.full[stage]);
      arrival_init(&shared.met[0]);
      arrival_init(&shared.met[1]);
    }
    __syncthreads();
    if (threadIdx.x == 0)
      for (int stage = 0; stage < plan.stages; stage++) fetch(stage, from + stage * clusters);
    cluster_barrier();  // no block tells anything to one whose mbarriers are not there
    int stage = 0;
    unsigned parity = 0;
    float value = 0;  // this thread's share of the divergence of the row before
    for (int row = from; row < rows; row += clusters) {
      float z[Columns], t[present ? Columns : 1];
      const int64_t label = a.label ? a.label[row] : -1;  // on its way while the row is measured
      arrival_wait(&shared.full[stage], parity);
      this->take(z, t, stage_at(stage), plan.part);
      Part mine = this->measure(z, t);
      if (early && present) mine.value = sum_of_warp(value);
      const bool valid = label >= 0 && label < a.vocab;
      if (threadIdx.x == 0 && valid && label >= first && label < first + inside)
        mine.z_y = this->one_of(stage_at(stage), int(label) - first);
      float by[kCorrect], lse_slope = 0;
      const Part all = meet(mine, shared.parts, shared.part_slots, [&] {
        if (threadIdx.x == 0) fetch(stage, row + plan.stages * clusters);
#pragma unroll
        for (int k = 0; k < kCorrect; k++)  // on their way while the blocks meet
          by[k] = k == kPotential || (k == kDivergence && !present) ? 0.0f : this->cotangent(k, row);
        if (a.live & kLseBit && a.lse_slope) lse_slope = static_cast<const float*>(a.lse_slope)[row];
      });
      if (early && present && row != from) put(row - clusters, kDivergence, all.value);
      Known<float> known = settle(all, row, label, valid);
      Pull pull = this->pull_of(known, by, lse_slope, all.z_y, valid);
      if constexpr (present && early) {
        value = a.out.data ? 0 : this->template compare<false>(z, t, known).f;
        put(row, kSlope, known.slope);
      }
      if constexpr (present && !early) {
        const bool kept = this->keeps(pull);
        const Sums sums = kept ? this->template compare<true>(z, t, known) : this->template compare<false>(z, t, known);
        const Sums whole = meet(Sums{sum_of_warp(sums.f), sum_of_warp(sums.g)}, shared.sums, shared.sum_slots, [] {});
        if (a.live & kDivergenceBit) known.slope = whole.g;
        put(row, kDivergence, whole.f);
        put(row, kSlope, known.slope);
        if (kept) this->combine(z, t, known, pull);
        else if (a.out.data) this->differentiate(z, t, known, pull);
      } else if (a.out.data) {
        value = this->differentiate(z, t, known, pull);
      }
      if (a.out.data) {
        this->hit(z, pull, int(valid ? label : -1));
        this->write(z, row);
      }
      if (++stage == plan.stages) stage = 0, parity ^= 1;
    }
    if constexpr (early && present) {
      Part last = Part::none();
      last.value = sum_of_warp(value);
      const Part all = meet(last, shared.parts, shared.part_slots, [] {});
      put(from + (rows - 1 - from) / clusters * clusters, kDivergence, all.value);
    }
    cluster_barrier();  // no block ends while another tells it anything
  }
};

#endif

template <class D, int Columns>
__global__ void __launch_bounds__(kLeanThreads, 1) lean_kernel(const RowArguments a, const Plan plan) {
#if defined(DFT_CUDA_ON_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  LeanRows<D, Columns>(a, plan).run();
#endif
}

}  // namespace

template <class D, int Columns>
const char* launch_lean(const RowArguments& a, const Plan& plan, CUstream_st* stream) {
  static Resident resident;
  return launch_clusters(resident, lean_kernel<D, Columns>, a.rows, plan.blocks, kLeanThreads, plan.arena(), stream,
                         a, plan);
}

}  // namespace dft::cuda

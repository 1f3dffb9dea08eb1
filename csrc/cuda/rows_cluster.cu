// The row kernels for devices with thread-block clusters and bulk copies (sm_90 on). A row, and its target's, is kept
// resident in shared memory between the sweeps, distributed over a cluster of 1 to 8 CTAs. See row_work.cuh for the
// formulas.
//
// Device memory traffic a logit: b + t + o for any divergence (the bytes of a logit, of the target's and of the
// gradient): each logit is read once and its gradient written once.
//
// Clusters are persistent: each works on many rows. Its CTAs load their parts of a row by the bulk copy engine, one
// copy a step (2048 logits). As soon as the last sweep of a row has consumed a step, the same step of the next row is
// loaded over it, so that loads overlap with the arithmetic and the cluster's reductions.
#include "dispatch.cuh"
#include "row_gradient.cuh"
#include "row_statistics.cuh"

namespace dft::cuda {
namespace {

constexpr int kThreads = 256, kMostBlocks = 8, kMostSteps = 32;
constexpr int kArena = 220 << 10;        // bytes of shared memory a CTA, at most
constexpr int kComfortable = 104 << 10;  // the same for two CTAs a multiprocessor
constexpr int kColumnsAStep = kThreads * kGroup<float>;

// The beginning of a CTA's shared memory; its parts of the row and of the target's follow. The buffers of cluster
// reductions are double: one cluster barrier a reduction is then enough.
struct Workspace {
  Arrival arrival[kMostSteps];
  Scratch<float> scratch;
  Measured<float> measured[2][kMostBlocks];
  float sums[2][kMostBlocks][kSums];
};
constexpr int kWorkspace = (sizeof(Workspace) + 127) / 128 * 128;

__host__ __device__ inline int64_t bytes_of(Element element) {
  return element == Element::f32 ? 4 : element == Element::f64 ? 8 : 2;
}

// How a row is distributed: `columns` a CTA, a multiple of 8 (0: it does not fit), CTAs, bytes of shared memory a CTA
struct Cut {
  int64_t columns;
  int blocks, bytes;
};

Cut cut(const RowArguments& a) {
  const int64_t bytes_a_column = bytes_of(a.logits.element) + (a.target.data ? bytes_of(a.target.element) : 0);
  for (int64_t most : {arena_limit(kComfortable), arena_limit(kArena)})
    for (int blocks = 1; blocks <= kMostBlocks; blocks *= 2) {
      const int64_t columns = (a.vocab + blocks * 8 - 1) / (blocks * 8) * 8;
      // whole steps, so that both parts are 16-byte aligned
      const int64_t capacity = (columns + kColumnsAStep - 1) / kColumnsAStep * kColumnsAStep;
      const int64_t bytes = kWorkspace + capacity * bytes_a_column;
      if (bytes <= most && capacity <= kMostSteps * kColumnsAStep) return {columns, blocks, int(bytes)};
    }
  return {0, 0, 0};
}

#if defined(DFT_CUDA_ON_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A CTA's part of the row, in its shared memory
struct ClusterStorage {
  static constexpr int threads = kThreads, warps = kThreads / 32;
  static constexpr bool backwards = false;

  const RowArguments& a;
  Workspace& workspace;
  char *const own, *const teacher;  // its parts of the row and of the target's
  const int64_t first, end, stop;   // columns; stop: `end` rounded up to a multiple of 8, what is copied
  const bool taught, leads;
  const int steps;
  int64_t next;         // the row whose steps are loaded as this one's are consumed
  unsigned round;       // rows done: the phase of the mbarriers
  unsigned reductions;  // done so far: which of the two buffers is next

  // Starts the copies of step `step` of row `row`
  __device__ __forceinline__ void load_step(int step, int64_t row) {
    const int64_t at = first + int64_t(step) * kColumnsAStep;
    const int64_t n = stop - at < kColumnsAStep ? stop - at : kColumnsAStep, offset = int64_t(step) * kColumnsAStep;
    const int64_t size = bytes_of(a.logits.element), target_size = taught ? bytes_of(a.target.element) : 0;
    Arrival* arrival = &workspace.arrival[step];
    arrival_expect(arrival, uint32_t(n * (size + target_size)));
    bulk_load(own + offset * size, static_cast<const char*>(a.logits.data) + (row * a.logits.stride + at) * size,
              uint32_t(n * size), arrival);
    if (taught)
      bulk_load(teacher + offset * target_size,
                static_cast<const char*>(a.target.data) + (row * a.target.stride + at) * target_size,
                uint32_t(n * target_size), arrival);
  }

  __device__ __forceinline__ void wait(int step) const { arrival_wait(&workspace.arrival[step], round & 1); }
  __device__ __forceinline__ void logits(float (&z)[kGroup<float>], int64_t at, int n) const {
    read(z, Matrix{own, 0, a.logits.element}, a.finish, 0, at - first, n);
  }
  __device__ __forceinline__ void target(float (&t)[kGroup<float>], int64_t at, int n) const {
    read(t, Matrix{teacher, 0, a.target.element}, a.target_finish, 0, at - first, n);
  }

  // slots[rank] of every CTA = `mine` of the CTA of that rank
  template <class X>
  __device__ __forceinline__ void exchange(const X& mine, X (&slots)[kMostBlocks]) const {
    if (threadIdx.x < cluster_size()) *of_rank(&slots[cluster_rank()], threadIdx.x) = mine;
    cluster_barrier();
  }

  template <int Count>
  __device__ __forceinline__ void sum(float (&x)[Count]) {
    block_sum<warps>(x, workspace.scratch);
    struct Numbers {
      float x[kSums];
    } mine = {};
    for (int k = 0; k < Count; k++) mine.x[k] = x[k];
    auto& slots = reinterpret_cast<Numbers(&)[kMostBlocks]>(workspace.sums[reductions % 2]);
    exchange(mine, slots);
    for (int k = 0; k < Count; k++) {
      x[k] = 0;
      for (unsigned rank = 0; rank < cluster_size(); rank++) x[k] += slots[rank].x[k];
    }
    reductions++;
  }

  __device__ __forceinline__ void reduce(Measured<float>& s, float inverse, float target_inverse) {
    float top = s.top, target_top = s.target_top;
    block_max<warps>(top, s.best, workspace.scratch);
    block_max<warps>(target_top, s.target_best, workspace.scratch);
    s.raise(top, target_top, inverse, target_inverse);
    block_sum<warps>(s.sums, workspace.scratch);
    auto& slots = workspace.measured[reductions % 2];
    exchange(s, slots);
    for (unsigned rank = 0; rank < cluster_size(); rank++) {
      prefer(top, s.best, slots[rank].top, slots[rank].best);
      prefer(target_top, s.target_best, slots[rank].target_top, slots[rank].target_best);
    }
    float sums[kSums] = {};
    for (unsigned rank = 0; rank < cluster_size(); rank++) {
      Measured<float> part = slots[rank];
      part.raise(top, target_top, inverse, target_inverse);
      for (int k = 0; k < kSums; k++) sums[k] += part.sums[k];
    }
    for (int k = 0; k < kSums; k++) s.sums[k] = sums[k];
    s.top = top, s.target_top = target_top;
    reductions++;
  }

  __device__ __forceinline__ void consumed(int step) {
    __syncthreads();
    if (threadIdx.x == 0 && next < a.rows) load_step(step, next);
  }
};

#endif

template <class D, bool Present>
__global__ void __launch_bounds__(kThreads, 2) cluster_kernel(const RowArguments a, const int64_t columns) {
#if defined(DFT_CUDA_ON_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const unsigned rank = cluster_rank(), size = cluster_size();
  const int64_t clusters = gridDim.x / size, from = blockIdx.x / size;
  const int64_t first = rank * columns < a.vocab ? rank * columns : a.vocab;
  const int64_t end = first + columns < a.vocab ? first + columns : a.vocab, stop = first + (end - first + 7) / 8 * 8;
  const int64_t capacity = (columns + kColumnsAStep - 1) / kColumnsAStep * kColumnsAStep;
  char* own = arena() + kWorkspace;
  ClusterStorage storage = {a,         *reinterpret_cast<Workspace*>(arena()),
                            own,       own + capacity * bytes_of(a.logits.element),
                            first,     end,
                            stop,      a.target.data != nullptr,
                            rank == 0, int((end - first + kColumnsAStep - 1) / kColumnsAStep),
                            from,      0,
                            0};
  if (threadIdx.x == 0)
    for (int step = 0; step < storage.steps; step++) arrival_init(&storage.workspace.arrival[step]);
  __syncthreads();
  if (threadIdx.x == 0)
    for (int step = 0; step < storage.steps; step++) storage.load_step(step, from);
  cluster_barrier();  // no CTA writes to the workspace of one that has not started
  for (int64_t row = from; row < a.rows; row += clusters, storage.round++) {
    storage.next = row + clusters;
    RowWork<float, D, Present, ClusterStorage>(a, storage, row).run();
  }
  cluster_barrier();  // no CTA exits while another may still write to its workspace
#endif
}

}  // namespace

bool fits_cluster(const RowArguments& a) {
  const auto whole = [&](const Matrix& m) {  // 16-byte aligned rows, which bulk copies need
    const int64_t size = bytes_of(m.element);
    return !m.data || (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * size % 16 == 0 && m.padded);
  };
  return a.wanted && a.logits.element != Element::f64 && a.target.element != Element::f64 && has_clusters() &&
         whole(a.logits) && whole(a.target) && cut(a).columns > 0;
}

const char* launch_rows_in_clusters(const RowArguments& a, CUstream_st* stream) {
  const Cut parts = cut(a);
  return with_pair<float>(Divergences(), a.divergence, [&](auto pair) {
    using P = decltype(pair);
    return launch_clusters(cluster_kernel<typename P::type, P::present>, a.rows, parts.blocks, kThreads, parts.bytes,
                           stream, a, parts.columns);
  });
}

}  // namespace dft::cuda

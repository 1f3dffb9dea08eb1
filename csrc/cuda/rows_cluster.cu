// The row kernels for devices with thread-block clusters and bulk copies (sm_90 on): the row, and its target's, stays
// on chip between the sweeps, spread over the shared memory of a cluster of 1 to 8 blocks. Mathematics as in
// rows_cuda.cu, whose sweeps (row_work.cuh) these are.
//
// Device memory a logit costs: b + t + o, whatever the divergence (b, t, o as there): each logit is read once and its
// gradient written once.
//
// A cluster lives for many rows. Its blocks load their parts by the bulk copy engine, a step (2048 logits) a copy; the
// last sweep of a row, when it is through with a step, has the same step of the next row loaded in its place, so that
// the memory is busy while a row is worked on and while its blocks meet.
#include "row_work.cuh"

namespace dft::cuda {
namespace {

constexpr int kThreads = 256, kMostBlocks = 8, kMostSteps = 32;
constexpr int kArena = 220 << 10;        // bytes of shared memory a block takes at most
constexpr int kComfortable = 104 << 10;  // two blocks a multiprocessor
constexpr int kColumnsAStep = kThreads * kGroup<float>;

// The beginning of a block's arena; its parts of the row and of the target's follow
struct Room {
  Arrival arrival[kMostSteps];
  Scratch<float> scratch;
  Measured<float>
      measured[2][kMostBlocks];  // of every block of the cluster; in turns, so that one barrier a meeting will do
  float sums[2][kMostBlocks][kSums];
};
constexpr int kRoom = (sizeof(Room) + 127) / 128 * 128;

__host__ __device__ inline int64_t bytes_of(Element element) {
  return element == Element::f32 ? 4 : element == Element::f64 ? 8 : 2;
}

// How the row is cut: `columns` for each block, a multiple of 8; 0: it does not fit
struct Cut {
  int64_t columns;
  int blocks, bytes;
};

Cut cut(const RowArguments& a) {
  const int64_t bytes_a_column = bytes_of(a.logits.element) + (a.target.data ? bytes_of(a.target.element) : 0);
  for (int64_t most : {arena_limit(kComfortable), arena_limit(kArena)})
    for (int blocks = 1; blocks <= kMostBlocks; blocks *= 2) {
      const int64_t columns = (a.vocab + blocks * 8 - 1) / (blocks * 8) * 8;
      // each part in whole steps, so that both begin on 16 bytes
      const int64_t room = (columns + kColumnsAStep - 1) / kColumnsAStep * kColumnsAStep;
      const int64_t bytes = kRoom + room * bytes_a_column;
      if (bytes <= most && room <= kMostSteps * kColumnsAStep) return {columns, blocks, int(bytes)};
    }
  return {0, 0, 0};
}

#if defined(DFT_CUDA_ON_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A block's part of the row, in its arena
struct ClusterPlace {
  static constexpr int threads = kThreads, warps = kThreads / 32;
  static constexpr bool backwards = false;

  const RowArguments& a;
  Room& room;
  char *const own, *const teacher;  // the parts
  const int64_t first, end, stop;   // columns; stop: `end` rounded up to what is copied
  const bool taught, leads;
  const int steps;
  int64_t next;      // the row whose steps are loaded as this one's are through
  unsigned round;    // rows done, as the arrivals count
  unsigned meeting;  // which of the rooms is next

  // Step `step` of row `row` on its way
  __device__ __forceinline__ void load_step(int step, int64_t row) {
    const int64_t at = first + int64_t(step) * kColumnsAStep;
    const int64_t n = stop - at < kColumnsAStep ? stop - at : kColumnsAStep, offset = int64_t(step) * kColumnsAStep;
    const int64_t size = bytes_of(a.logits.element), target_size = taught ? bytes_of(a.target.element) : 0;
    Arrival* arrival = &room.arrival[step];
    arrival_expect(arrival, uint32_t(n * (size + target_size)));
    bulk_load(own + offset * size, static_cast<const char*>(a.logits.data) + (row * a.logits.stride + at) * size,
              uint32_t(n * size), arrival);
    if (taught)
      bulk_load(teacher + offset * target_size,
                static_cast<const char*>(a.target.data) + (row * a.target.stride + at) * target_size,
                uint32_t(n * target_size), arrival);
  }

  __device__ __forceinline__ void arrive(int step) const { arrival_wait(&room.arrival[step], round & 1); }
  __device__ __forceinline__ void logits(float (&z)[kGroup<float>], int64_t at, int n) const {
    read(z, Matrix{own, 0, a.logits.element}, a.finish, 0, at - first, n);
  }
  __device__ __forceinline__ void target(float (&t)[kGroup<float>], int64_t at, int n) const {
    read(t, Matrix{teacher, 0, a.target.element}, a.target_finish, 0, at - first, n);
  }

  // Every block's numbers in every block's room
  template <class X>
  __device__ __forceinline__ void exchange(const X& mine, X (&slots)[kMostBlocks]) const {
    if (threadIdx.x < cluster_size()) *of_rank(&slots[cluster_rank()], threadIdx.x) = mine;
    cluster_barrier();
  }

  template <int Count>
  __device__ __forceinline__ void sum(float (&x)[Count]) {
    block_sum<warps>(x, room.scratch);
    struct Numbers {
      float x[kSums];
    } mine = {};
    for (int k = 0; k < Count; k++) mine.x[k] = x[k];
    auto& slots = reinterpret_cast<Numbers(&)[kMostBlocks]>(room.sums[meeting % 2]);
    exchange(mine, slots);
    for (int k = 0; k < Count; k++) {
      x[k] = 0;
      for (unsigned rank = 0; rank < cluster_size(); rank++) x[k] += slots[rank].x[k];
    }
    meeting++;
  }

  __device__ __forceinline__ void meet(Measured<float>& s, float inverse, float target_inverse) {
    float top = s.top, target_top = s.target_top;
    block_max<warps>(top, s.best, room.scratch);
    block_max<warps>(target_top, s.target_best, room.scratch);
    s.raise(top, target_top, inverse, target_inverse);
    block_sum<warps>(s.sums, room.scratch);
    auto& slots = room.measured[meeting % 2];
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
    meeting++;
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
  const int64_t room = (columns + kColumnsAStep - 1) / kColumnsAStep * kColumnsAStep;
  char* own = arena() + kRoom;
  ClusterPlace place = {a,         *reinterpret_cast<Room*>(arena()),
                        own,       own + room * bytes_of(a.logits.element),
                        first,     end,
                        stop,      a.target.data != nullptr,
                        rank == 0, int((end - first + kColumnsAStep - 1) / kColumnsAStep),
                        from,      0,
                        0};
  if (threadIdx.x == 0)
    for (int step = 0; step < place.steps; step++) arrival_init(&place.room.arrival[step]);
  __syncthreads();
  if (threadIdx.x == 0)
    for (int step = 0; step < place.steps; step++) place.load_step(step, from);
  cluster_barrier();  // every block is there before another one writes to its room
  for (int64_t row = from; row < a.rows; row += clusters, place.round++) {
    place.next = row + clusters;
    RowWork<float, D, Present, ClusterPlace>(a, place, row).run();
  }
  cluster_barrier();  // no block leaves while another may still write to its room
#endif
}

}  // namespace

bool fits_cluster(const RowArguments& a) {
  const auto whole = [&](const Matrix& m) {  // rows that a bulk copy can take
    const int64_t size = bytes_of(m.element);
    return !m.data || (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * size % 16 == 0 && m.padded);
  };
  return a.wanted && a.logits.element != Element::f64 && a.target.element != Element::f64 && has_clusters() &&
         whole(a.logits) && whole(a.target) && cut(a).columns > 0;
}

const char* launch_rows_in_clusters(const RowArguments& a, CUstream_st* stream) {
  const Cut parts = cut(a);
  return with_pair<float>(a.divergence, [&](auto pair) {
    using P = decltype(pair);
    return launch_clusters(cluster_kernel<typename P::type, P::present>, a.rows, parts.blocks, kThreads, parts.bytes,
                           stream, a, parts.columns);
  });
}

}  // namespace dft::cuda

// CUDA's threads, barriers, shuffles, clusters and bulk copies on a CPU, as far as csrc/cuda uses them: the same kernel
// source, executed. csrc/cuda/gpu.h includes it instead of CUDA's headers where DFT_CUDA_ON_HOST is defined.
//
// Clusters of blocks run one after another. The threads of a cluster are fibres on one CPU thread: each runs until it
// waits, at a barrier of its block or cluster, in an exchange of its warp or for an mbarrier. A warp gets as far as it
// can by itself before the next one has its turn, a block likewise, and `reversed` runs them from the last to the
// first: what depends on who comes first, as where a barrier is missing, then comes out differently in one of the two.
// A round in which nobody can go on is a divergent barrier, and is reported.
//
// Shared memory begins as NaN. What is copied or stored asynchronously fills its place with NaN at once and with its
// numbers as late as can be: when nobody can go on, for one of the mbarriers that somebody waits for. Who does not
// wait, or has not done with the place, notices. An mbarrier that hears of more bytes than were announced,
// or of some that nobody waits for, is reported too.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // for blocks that are no cluster: they run one at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct CUstream_st;

namespace on_host {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kWarp = 32;

struct Fibre {
  ucontext_t first;  // to enter it; _setjmp and _longjmp, which make no system call, switch from then on
  jmp_buf at;
  bool entered, done;
  uint64_t mailbox;
};

struct Barrier {
  unsigned arrived = 0;
  uint64_t opened = 0;
};

// An mbarrier. A phase ends when `count` have arrived and no announced byte is missing.
struct Counter {
  int32_t missing;
  uint16_t count, awaited : 15, phase : 1;
};

// A copy or store under way: from memory, or of `kept` bytes that were given
struct Write {
  void* to;
  const void* from;
  uint32_t bytes;
  Counter* counter;
  char kept[64];
};

struct Machine {
  bool reversed = false;
  int64_t arena_limit = 0;  // below the device's, so that small rows need a cluster; 0: the device's
  dim3 grid, first_block;   // of the cluster that runs
  unsigned threads = 0, blocks = 1, current = 0;  // of a block, of a cluster, the running thread
  std::vector<Fibre> fibres;
  std::vector<char> stacks, arenas;
  size_t arena_bytes = 0;
  jmp_buf home;
  std::function<void()> body;
  std::vector<Barrier> warp, block;
  Barrier cluster;
  std::vector<Write> writes;
  std::vector<Counter*> waited;  // those that somebody waits for, since the last round
  std::exception_ptr thrown;     // by the thread that ran last
  uint64_t events = 0;  // of any kind: a round without one is a deadlock
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void wait() {
  Machine& m = machine();
  if (!_setjmp(m.fibres[m.current].at)) _longjmp(m.home, 1);
}

inline void enter() {
  Machine& m = machine();
  try {
    m.body();
  } catch (...) {
    m.thrown = std::current_exception();
  }
  m.fibres[m.current].done = true;
  m.events++;
  wait();
}

inline void run_until_it_waits(unsigned thread) {
  Machine& m = machine();
  m.current = thread;
  if (_setjmp(m.home)) {
    if (m.thrown) std::rethrow_exception(std::exchange(m.thrown, nullptr));
    return;
  }
  Fibre& fibre = m.fibres[thread];
  if (fibre.entered) _longjmp(fibre.at, 1);
  fibre.entered = true;
  setcontext(&fibre.first);
}

inline void check(Counter* c) {
  machine().events++;
  if (c->awaited || c->missing > 0) return;
  if (c->missing < 0) throw std::runtime_error("an mbarrier was sent more bytes than were announced");
  c->awaited = c->count;
  c->phase ^= 1;
}

inline void arrive(Counter* c, uint32_t announced) {
  if (!c->awaited) throw std::runtime_error("an mbarrier was arrived at more often in a phase than it awaits");
  c->missing += int32_t(announced);
  c->awaited--;
  check(c);
}

// Whether the phase of this parity has ended; where not, after the others have had their turn
inline bool ended(Counter* c, uint32_t parity) {
  if (c->phase != parity) return true;
  machine().waited.push_back(c);
  wait();
  return false;
}

inline void start(const Write& write) {
  std::memset(write.to, 0xff, write.bytes);
  machine().writes.push_back(write);
  machine().events++;
}

inline void start_copy(void* to, const void* from, uint32_t bytes, Counter* counter) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    throw std::runtime_error("a bulk copy that is not in units of 16 bytes");
  start({to, from, bytes, counter, {}});
}

// Ends the writes to one of the mbarriers that are waited for
inline void finish_writes() {
  Machine& m = machine();
  if (m.reversed) std::reverse(m.waited.begin(), m.waited.end());
  for (Counter* counter : m.waited) {
    const auto counted = [&](const Write& write) { return write.counter == counter; };
    if (std::none_of(m.writes.begin(), m.writes.end(), counted)) continue;
    for (const Write& write : m.writes) {
      if (!counted(write)) continue;
      std::memcpy(write.to, write.from ? write.from : write.kept, write.bytes);
      counter->missing -= int32_t(write.bytes);
    }
    std::erase_if(m.writes, counted);
    check(counter);
    break;
  }
}

// Runs the threads from `first` on, in parts of `part` of them, each part as far as it can get by itself before the
// next.
inline bool run_threads(unsigned first, unsigned count, unsigned part) {
  Machine& m = machine();
  bool all = true;
  for (unsigned i = 0; i < count / part; i++) {
    const unsigned from = first + (m.reversed ? count / part - 1 - i : i) * part;
    if (part == 1) {
      if (!m.fibres[from].done) run_until_it_waits(from);
      all = all && m.fibres[from].done;
      continue;
    }
    bool done = false;
    for (uint64_t seen = m.events - 1; seen != m.events && !done;) {
      seen = m.events;
      done = run_threads(from, part, part == kWarp ? 1 : kWarp);
    }
    all = all && done;
  }
  return all;
}

inline void run_cluster() {
  Machine& m = machine();
  const unsigned count = m.threads * m.blocks;
  m.block.assign(m.blocks, {});
  m.warp.assign(count / kWarp, {});
  m.cluster = {};
  for (unsigned t = 0; t < count; t++) {
    Fibre& fibre = m.fibres[t];
    fibre.entered = fibre.done = false;
    getcontext(&fibre.first);
    fibre.first.uc_stack.ss_sp = m.stacks.data() + t * kStack;
    fibre.first.uc_stack.ss_size = kStack;
    fibre.first.uc_link = nullptr;
    makecontext(&fibre.first, enter, 0);
  }
  for (;;) {
    const uint64_t before = m.events;
    m.waited.clear();
    if (run_threads(0, count, m.threads)) break;
    if (m.events == before) finish_writes();
    if (m.events == before) throw std::runtime_error("deadlock: the threads of a block wait at different barriers");
  }
  if (!m.writes.empty()) throw std::runtime_error("nobody has waited for an asynchronous write");
}

template <class Body>
void run_grid(dim3 grid, unsigned blocks, int threads, size_t arena_bytes, Body body) {
  Machine& m = machine();
  m.grid = grid;
  m.threads = unsigned(threads);
  m.blocks = blocks;
  m.body = body;
  m.arena_bytes = arena_bytes;
  m.writes.clear();
  m.arenas.resize(blocks * arena_bytes + 128);
  m.fibres.resize(m.threads * blocks);
  if (m.stacks.size() < m.threads * blocks * kStack) m.stacks.resize(m.threads * blocks * kStack);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x += blocks) {
        std::fill(m.arenas.begin(), m.arenas.end(), char(0xff));
        m.first_block = dim3(x, y, z);
        run_cluster();
      }
}

inline unsigned rank() { return machine().current / machine().threads; }

inline dim3 block_index() {
  const dim3& first = machine().first_block;
  return dim3(first.x + rank(), first.y, first.z);
}

// What all `expected` threads of a barrier pass together
inline void meet(Barrier& barrier, unsigned expected) {
  const uint64_t now = barrier.opened;
  machine().events++;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    barrier.opened++;
    return;
  }
  while (barrier.opened == now) wait();
}

template <class T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  Machine& m = machine();
  std::memcpy(&m.fibres[m.current].mailbox, &value, sizeof value);
  meet(m.warp[m.current / kWarp], kWarp);
  T result;
  std::memcpy(&result, &m.fibres[m.current / kWarp * kWarp + from].mailbox, sizeof result);
  meet(m.warp[m.current / kWarp], kWarp);  // nobody writes before everybody has read
  return result;
}

template <class Run>
const char* reported(Run run) {
  try {
    run();
  } catch (const std::exception& error) {
    static std::string message;
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace on_host

#define threadIdx (dim3(on_host::machine().current % on_host::machine().threads))
#define blockIdx (on_host::block_index())
#define gridDim (on_host::machine().grid)

inline void __syncthreads() { on_host::meet(on_host::machine().block[on_host::rank()], on_host::machine().threads); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return on_host::exchange(value, on_host::machine().current % on_host::kWarp ^ unsigned(mask));
}

namespace dft::cuda {

inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}
inline float from_f16(uint16_t x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return float(half);
}
inline uint16_t to_f16(float x) {
  const _Float16 half = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, CUstream_st*, Arguments... arguments) {
  return on_host::reported([&] { on_host::run_grid(grid, 1, threads, 0, [=] { kernel(arguments...); }); });
}

inline uint32_t pack_bf16(float a, float b) { return uint32_t(to_bf16(b)) << 16 | to_bf16(a); }
inline uint32_t pack_f16(float a, float b) { return uint32_t(to_f16(b)) << 16 | to_f16(a); }

struct Resident {};

template <class... Parameters, class... Arguments>
const char* launch_clusters(Resident&, void (*kernel)(Parameters...), int64_t most, int size, int threads, int bytes,
                            CUstream_st*, Arguments... arguments) {
  const dim3 grid(unsigned((most < 2 ? most : 2) * size));  // two clusters at a time: each has several rows
  return on_host::reported(
      [&] { on_host::run_grid(grid, unsigned(size), threads, size_t(bytes), [=] { kernel(arguments...); }); });
}

inline int cluster_arena() {
  const int64_t limit = on_host::machine().arena_limit;
  return limit ? int(limit) : 227 << 10;
}

inline char* arena_of(unsigned rank) {
  on_host::Machine& m = on_host::machine();
  const uintptr_t start = (reinterpret_cast<uintptr_t>(m.arenas.data()) + 127) / 128 * 128;
  return reinterpret_cast<char*>(start + rank * m.arena_bytes);
}
inline char* arena() { return arena_of(on_host::rank()); }

struct alignas(8) Arrival {
  on_host::Counter counter;
};
inline void arrival_init(Arrival* a) { a->counter = {0, 1, 1, 0}; }
inline void arrival_expect(Arrival* a, uint32_t bytes) { on_host::arrive(&a->counter, bytes); }
inline void arrival_wait(Arrival* a, uint32_t parity) {
  while (!on_host::ended(&a->counter, parity)) {
  }
}
inline void bulk_load(void* to, const void* from, uint32_t bytes, Arrival* a) {
  on_host::start_copy(to, from, bytes, &a->counter);
}
inline unsigned cluster_rank() { return on_host::rank(); }
inline unsigned cluster_size() { return on_host::machine().blocks; }
inline void cluster_barrier() {
  on_host::Machine& m = on_host::machine();
  on_host::meet(m.cluster, m.threads * m.blocks);
}
template <class T>
T* of_rank(T* mine, unsigned rank) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(mine) - arena() + arena_of(rank));
}
template <class X>
void send(X* to, unsigned rank, const X& x, Arrival* arrival) {
  static_assert(sizeof(X) % 8 == 0 && alignof(X) % 8 == 0);
  on_host::Write write = {of_rank(to, rank), nullptr, sizeof x, &of_rank(arrival, rank)->counter, {}};
  static_assert(sizeof x <= sizeof write.kept);
  std::memcpy(write.kept, &x, sizeof x);
  on_host::start(write);
}

}  // namespace dft::cuda

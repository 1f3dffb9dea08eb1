// CUDA's threads, barriers and shuffles on a CPU, as far as csrc/rows_cuda.cu uses them: the same kernel source,
// executed. Included by csrc/gpu.h in the place of CUDA's headers where DFT_CUDA_ON_HOST is defined.
//
// Blocks run one after another. The threads of a block are fibres on one CPU thread: each runs until it waits, at a
// barrier of its block or in an exchange of its warp, and the others run on from there. A round in which nobody can go on
// is a divergent barrier, and is reported. `reversed` runs the threads of every round from the last to the first: what
// depends on the order of threads between two barriers, as with one that is missing, then comes out differently.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

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
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct CUstream_st;

namespace on_host {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kWarp = 32;

struct Fibre {
  ucontext_t first;  // to enter it; _setjmp and _longjmp, which make no system call, switch from then on
  jmp_buf at;
  bool entered, done;
  uint64_t mailbox;
};

struct Machine {
  bool reversed = false;
  dim3 grid, block_index;
  unsigned threads = 0, current = 0;
  std::vector<Fibre> fibres;
  std::vector<char> stacks;
  jmp_buf home;
  std::function<void()> body;
  // barriers: how many have arrived, and how often it opened
  unsigned arrived = 0;
  uint64_t opened = 0;
  std::vector<unsigned> warp_arrived;
  std::vector<uint64_t> warp_opened;
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
  m.body();
  m.fibres[m.current].done = true;
  m.events++;
  wait();
}

inline void run_until_it_waits(unsigned thread) {
  Machine& m = machine();
  m.current = thread;
  if (_setjmp(m.home)) return;
  Fibre& fibre = m.fibres[thread];
  if (fibre.entered) _longjmp(fibre.at, 1);
  fibre.entered = true;
  setcontext(&fibre.first);
}

inline void run_block() {
  Machine& m = machine();
  m.arrived = 0;
  m.warp_arrived.assign((m.threads + kWarp - 1) / kWarp, 0);
  m.warp_opened.assign(m.warp_arrived.size(), 0);
  for (unsigned t = 0; t < m.threads; t++) {
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
    bool all = true;
    for (unsigned i = 0; i < m.threads; i++) {
      const unsigned t = m.reversed ? m.threads - 1 - i : i;
      if (m.fibres[t].done) continue;
      run_until_it_waits(t);
      all = all && m.fibres[t].done;
    }
    if (all) return;
    if (m.events == before) throw std::runtime_error("deadlock: the threads of a block wait at different barriers");
  }
}

template <class Body>
void run_grid(dim3 grid, int threads, Body body) {
  Machine& m = machine();
  m.grid = grid;
  m.threads = unsigned(threads);
  m.body = body;
  m.fibres.resize(m.threads);
  m.stacks.resize(m.threads * kStack);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        m.block_index = dim3(x, y, z);
        run_block();
      }
}

// What all `expected` threads of a barrier pass together
inline void meet(unsigned& arrived, uint64_t& opened, unsigned expected) {
  Machine& m = machine();
  const uint64_t now = opened;
  m.events++;
  if (++arrived == expected) {
    arrived = 0;
    opened++;
    return;
  }
  while (opened == now) wait();
}

inline void meet_warp() {
  Machine& m = machine();
  const unsigned warp = m.current / kWarp, rest = m.threads - warp * kWarp;
  meet(m.warp_arrived[warp], m.warp_opened[warp], rest < kWarp ? rest : kWarp);
}

template <class T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  Machine& m = machine();
  std::memcpy(&m.fibres[m.current].mailbox, &value, sizeof value);
  meet_warp();
  T result;
  std::memcpy(&result, &m.fibres[m.current / kWarp * kWarp + from].mailbox, sizeof result);
  meet_warp();  // nobody writes before everybody has read
  return result;
}

}  // namespace on_host

#define threadIdx (dim3(on_host::machine().current))
#define blockIdx (on_host::machine().block_index)

inline void __syncthreads() {
  on_host::Machine& m = on_host::machine();
  on_host::meet(m.arrived, m.opened, m.threads);
}

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
  try {
    on_host::run_grid(grid, threads, [=] { kernel(arguments...); });
  } catch (const std::exception& error) {
    static std::string message;
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace dft::cuda

// What translated PTX is made of (translate.py): arithmetic on registers, shared memory and its mbarriers, boxes of
// tensors, a warpgroup's product, over the threads of cuda_on_host.h. Copies and stores that an mbarrier counts come as
// late as can be; other asynchronous work is done when it is asked for.
#pragma once

#include <bit>
#include <memory>

#include "cuda_on_host.h"
#include "launch.h"

namespace ptx {

// All bits of a register are set before it is written
template <class Registers>
struct Held {
  std::unique_ptr<Registers> registers{new Registers};
  Held() { std::memset(static_cast<void*>(registers.get()), 0xff, sizeof(Registers)); }
};

// Numbers of 16 bits, for conversions
template <float (*Widen)(uint16_t), uint16_t (*Round)(float)>
struct Narrow {
  uint16_t bits;
  explicit Narrow(uint16_t bits) : bits(bits) {}
  explicit Narrow(float x) : bits(Round(x)) {}
  explicit operator float() const { return Widen(bits); }
};
using Bf16 = Narrow<dft::cuda::from_bf16, dft::cuda::to_bf16>;
using F16 = Narrow<dft::cuda::from_f16, dft::cuda::to_f16>;

// A register's bits as a T
template <class T, class X>
T as(X x) {
  if constexpr (std::is_same_v<T, X>) return x;
  else if constexpr (std::is_same_v<T, float>) return std::bit_cast<float>(uint32_t(x));
  else if constexpr (std::is_same_v<T, double>) return std::bit_cast<double>(uint64_t(x));
  else if constexpr (std::is_same_v<X, float>) return T(std::bit_cast<uint32_t>(x));
  else if constexpr (std::is_same_v<X, double>) return T(std::bit_cast<uint64_t>(x));
  else if constexpr (std::is_same_v<X, Bf16> || std::is_same_v<X, F16>) return T(x.bits);
  else if constexpr (std::is_same_v<T, Bf16> || std::is_same_v<T, F16>) return T(uint16_t(x));
  else return T(x);
}
template <class R, class X>
void put(R& to, X x) {
  to = as<R>(x);
}
template <class R>
R& unread() {  // a result that nobody asked for
  static R r;
  return r;
}
template <class To, class Part>
void pack(To& to, Part low, Part high) {
  const uint64_t a = sizeof low == 2 ? as<uint16_t>(low) : as<uint32_t>(low);
  const uint64_t b = sizeof low == 2 ? as<uint16_t>(high) : as<uint32_t>(high);
  put(to, b << 8 * sizeof low | a);
}
template <class Part, class From>
void unpack(Part& low, Part& high, From x) {
  put(low, as<uint64_t>(x)), put(high, as<uint64_t>(x) >> 8 * sizeof low);
}

template <class X>
X not_of(X x) {
  if constexpr (std::is_same_v<X, bool>) return !x;
  else return X(~x);
}
template <class X>
X min_of(X a, X b) {
  if constexpr (std::is_floating_point_v<X>) return std::fmin(a, b);
  else return std::min(a, b);
}
template <class X>
X max_of(X a, X b) {
  if constexpr (std::is_floating_point_v<X>) return std::fmax(a, b);
  else return std::max(a, b);
}
template <class X>
X shl_of(X x, X by) {
  return std::make_unsigned_t<X>(by) < 8 * sizeof(X) ? X(x << by) : X(0);
}
template <class X>
X shr_of(X x, X by) {
  if (std::make_unsigned_t<X>(by) < 8 * sizeof(X)) return X(x >> by);
  return x < 0 ? X(-1) : X(0);
}
template <class X>
X bfe_of(X x, X at, X count) {
  using U = std::make_unsigned_t<X>;
  const U all = 8 * sizeof(X), left = all - std::min(all, U(at + count));
  return count == 0 ? X(0) : shr_of(shl_of(x, X(left)), X(std::min(all, U(left + at))));
}
inline uint32_t bfi_of(uint32_t part, uint32_t whole, uint32_t at, uint32_t count) {
  const uint32_t ones = (count < 32 ? (1u << count) - 1 : ~0u) << at;
  return (whole & ~ones) | (part << at & ones);
}
inline uint32_t prmt_of(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t pick = selector >> 4 * i & 15, byte = both >> 8 * (pick & 7) & 255;
    out |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float ex2_of(float x) { return flushed(std::exp2(flushed(x))); }
inline float lg2_of(float x) { return std::log2(flushed(x)); }
template <class X>
X rcp_of(X x) {
  return 1 / x;
}

// Shared addresses: the block's rank + 1 above 24 bits of place where a kernel has mapped one to a block, else 0, its
// own. The first bytes are the system's, as on a GPU; static memory follows, then what a launch asks for.
inline uint32_t address_of(uint32_t address, uint32_t rank) { return (rank + 1) << 24 | (address & 0xffffff); }
inline void map_to(uint32_t& to, uint32_t address, uint32_t rank) { to = address_of(address, rank); }
inline char* shared(uint32_t address) {
  const uint32_t rank = address >> 24, place = address & 0xffffff;
  if (place < kFirstShared || place >= on_host::machine().arena_bytes || rank > on_host::machine().blocks)
    throw std::runtime_error("an address beyond the shared memory");
  return dft::cuda::arena_of(rank ? rank - 1 : on_host::rank()) + place;
}

template <class T, class Place>
T* aligned(Place place, size_t numbers) {
  if (uintptr_t(place) % (sizeof(T) * numbers)) throw std::runtime_error("an address that is not aligned");
  return reinterpret_cast<T*>(place);
}
template <class T, class Place, class... R>
void ld_of(Place place, R&... to) {
  const T* from = aligned<const T>(place, sizeof...(to));
  (put(to, *from++), ...);
}
template <class T, class Place, class... X>
void st_of(Place place, X... x) {
  T* to = aligned<T>(place, sizeof...(x));
  ((*to++ = as<T>(x)), ...);
}

inline unsigned lane() { return on_host::machine().current % on_host::kWarp; }

inline void shuffle(uint32_t& to, uint8_t& valid, uint32_t x, uint32_t from) {
  valid = from < on_host::kWarp;
  to = on_host::exchange(x, valid ? from : lane());
}
inline void shuffle_idx(uint32_t& to, uint8_t& valid, uint32_t x, uint32_t from, uint32_t, uint32_t) {
  shuffle(to, valid, x, from % on_host::kWarp);
}
inline void shuffle_down(uint32_t& to, uint8_t& valid, uint32_t x, uint32_t by, uint32_t, uint32_t) {
  shuffle(to, valid, x, lane() + by);
}
inline void shuffle_bfly(uint32_t& to, uint8_t& valid, uint32_t x, uint32_t mask, uint32_t, uint32_t) {
  shuffle(to, valid, x, lane() ^ mask);
}
inline void reduce_min(uint32_t& to, uint32_t x, uint32_t) {
  int32_t least = int32_t(x);
  for (unsigned from = 0; from < on_host::kWarp; from++) least = std::min(least, int32_t(on_host::exchange(x, from)));
  to = uint32_t(least);
}
inline void elect(uint32_t& leader, uint8_t& chosen, uint32_t mask) {
  leader = uint32_t(std::countr_zero(mask)), chosen = lane() == leader;
}

inline on_host::Counter* counter(uint32_t address) { return reinterpret_cast<on_host::Counter*>(shared(address)); }
inline void barrier_init(uint32_t address, uint32_t count) {
  *counter(address) = {0, uint16_t(count), uint16_t(count), 0};
}
inline void barrier_arrive(uint32_t address, uint32_t announced = 0) { on_host::arrive(counter(address), announced); }
inline void barrier_ended(uint8_t& done, uint32_t address, uint32_t parity, uint32_t = 0) {
  done = on_host::ended(counter(address), parity);
}

// What a thread knows of itself
struct Thread {
  uint64_t passing = 0;  // how often the cluster's barrier had opened when it arrived
  std::vector<std::vector<on_host::Write>> groups{{}};  // copies under way, the last group not committed yet
};
struct State {
  std::vector<on_host::Barrier> named;  // barriers, 16 a block
  std::vector<Thread> threads;
};
inline State& state() {
  static State s;
  return s;
}
inline Thread& this_thread() { return state().threads[on_host::machine().current]; }

inline void named_barrier(uint32_t id, uint32_t threads = on_host::machine().threads) {
  on_host::meet(state().named[on_host::rank() * 16 + id], threads);
}
inline void cluster_arrive() {
  on_host::Machine& m = on_host::machine();
  this_thread().passing = m.cluster.opened;
  m.events++;
  if (++m.cluster.arrived == m.threads * m.blocks) m.cluster.arrived = 0, m.cluster.opened++;
}
inline void cluster_wait() {
  while (on_host::machine().cluster.opened == this_thread().passing) on_host::wait();
}

// Copies of this thread, of `given` bytes and zeros after them, which come when it waits for them
inline void copy_grouped(uint32_t to, uint64_t from, uint32_t bytes, uint32_t given) {
  on_host::Write write = {shared(to), nullptr, bytes, nullptr, {}};
  std::memcpy(write.kept, reinterpret_cast<const void*>(from), std::min(given, bytes));
  std::memset(write.to, 0xff, bytes);
  this_thread().groups.back().push_back(write);
}
inline void commit_group() { this_thread().groups.emplace_back(); }
inline void wait_group(size_t left) {
  auto& groups = this_thread().groups;
  for (; groups.size() > left + 1; groups.erase(groups.begin()))
    for (const on_host::Write& write : groups.front()) std::memcpy(write.to, write.kept, write.bytes);
}

inline void copy_async(uint32_t to, uint64_t from, uint32_t bytes, uint32_t arrival) {
  on_host::start_copy(shared(to), reinterpret_cast<const void*>(from), bytes, counter(arrival));
}
inline void store_async(uint32_t to, uint64_t x, uint32_t arrival) {
  on_host::Write write = {shared(to), nullptr, sizeof x, counter(arrival), {}};
  std::memcpy(write.kept, &x, sizeof x);
  on_host::start(write);
}

// Four 8 x 8 matrices of 16-bit numbers; the address of row i of matrix j is that of lane 8 j + i
inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t values[] = {a, b, c, d};
  for (unsigned j = 0; j < 4; j++) {
    const uint32_t row = on_host::exchange(address, 8 * j + lane() / 4);
    std::memcpy(shared(row + lane() % 4 * 4), &values[j], 4);
  }
}

template <class... R>
void load_matrices(uint32_t address, R&... to) {
  unsigned j = 0;
  (std::memcpy(&to, shared(on_host::exchange(address, 8 * j++ + lane() / 4) + lane() % 4 * 4), 4), ...);
}
template <class... R>
void load_transposed(uint32_t address, R&... to) {
  unsigned j = 0;
  const auto load = [&](uint32_t& to) {
    uint16_t numbers[2];
    for (unsigned i = 0; i < 2; i++) {
      const uint32_t row = on_host::exchange(address, 8 * j + lane() % 4 * 2 + i);
      std::memcpy(&numbers[i], shared(row + lane() / 4 * 2), 2);
    }
    std::memcpy(&to, numbers, 4), j++;
  };
  (load(to), ...);
}

// Units of 16 bytes of shared memory change places by the bits above them
constexpr uint32_t kUnit = 16;
inline uint32_t swizzled(uint32_t address, uint32_t bits) {
  return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4);
}

// An operand of a product, in units of 128 swizzled bytes: along k, groups of 8 rows `stride` apart; or transposed, 64
// rows of each k, the next 64 rows `leading` apart and the next 8 of k `stride`
struct Operand {
  uint32_t start, leading, stride;
  bool transposed;
  Operand(uint64_t descriptor, bool transposed) : start(field(descriptor)), leading(field(descriptor >> 16)),
                                                  stride(field(descriptor >> 32)), transposed(transposed) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7))
      throw std::runtime_error("a matrix descriptor of an unknown layout");
  }
  static uint32_t field(uint64_t bits) { return uint32_t(bits & 0x3fff) << 4; }
  void row(uint32_t i, float (&out)[16]) const {
    for (uint32_t k = 0; k < 16; k++) {
      const uint32_t along = start + i / 8 * stride + i % 8 * 128 + k * 2;
      const uint32_t across = start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128;
      uint16_t number;
      std::memcpy(&number, shared(swizzled(transposed ? across : along, 3)), sizeof number);
      out[k] = dft::cuda::from_bf16(number);
    }
  }
};
// d[64, N] (+)= a[64, 16] b[N, 16].T of a warpgroup, this thread's share of it
template <int N, class R>
void multiply(R* const (&d)[N / 2], uint64_t a, uint64_t b, uint8_t adds, bool a_transposed, bool b_transposed) {
  const Operand left(a, a_transposed), right(b, b_transposed);
  const uint32_t first = on_host::machine().current / 32 % 4 * 16 + lane() / 4;
  float rows[2][16], column[16];
  left.row(first, rows[0]), left.row(first + 8, rows[1]);
  for (int j = 0; j < N / 8; j++)
    for (int c = 0; c < 2; c++) {
      right.row(j * 8 + lane() % 4 * 2 + c, column);
      for (int r = 0; r < 2; r++) {
        float total = 0;
        for (int k = 0; k < 16; k++) total += rows[r][k] * column[k];
        R& sum = *d[4 * j + 2 * r + c];
        put(sum, adds ? as<float>(sum) + total : total);
      }
    }
}

// f(place in the box in bytes, place in memory or null beyond the tensor) for each unit of a box's rows; V and H are
// multiples of a unit
template <class F>
void each_unit(uint64_t tensor, uint32_t x, uint32_t y, uint32_t z, F f) {
  const TensorMap& map = *reinterpret_cast<const TensorMap*>(tensor);
  const uint32_t step = kUnit / map.size;
  if (map.box[0] % step || map.dims[0] % step || int32_t(x) % int32_t(step))
    throw std::runtime_error("a box whose rows are not in units of 16 bytes");
  uint32_t place = 0;
  for (uint32_t k = z; k < z + map.box[2]; k++)
    for (uint32_t j = y; j < y + map.box[1]; j++)
      for (uint32_t i = x; i < x + map.box[0]; i += step, place += kUnit)
        f(swizzled(place, map.swizzle),  // boxes begin where the pattern does
          i < map.dims[0] && j < map.dims[1] && k < map.dims[2]
              ? map.data + i * map.size + j * map.strides[0] + k * map.strides[1]
              : nullptr);
}
inline void load_box_of_all(uint32_t to, uint64_t tensor, uint32_t x, uint32_t y, uint32_t z, uint32_t arrival,
                            uint32_t ranks, uint64_t) {
  static const char zeros[kUnit] = {};
  for (uint32_t rank = 0; rank < 16; rank++)
    if (ranks >> rank & 1)
      each_unit(tensor, x, y, z, [&](uint32_t place, const char* from) {
        on_host::start({shared(address_of(to, rank) + place), from ? from : zeros, kUnit,
                        counter(address_of(arrival, rank)), {}});
      });
}
inline void load_box(uint32_t to, uint64_t tensor, uint32_t x, uint32_t y, uint32_t z, uint32_t arrival, uint64_t) {
  load_box_of_all(to, tensor, x, y, z, arrival, 1u << on_host::rank(), 0);
}
inline void store_box(uint64_t tensor, uint32_t x, uint32_t y, uint32_t z, uint32_t from) {
  each_unit(tensor, x, y, z, [&](uint32_t place, char* to) {
    if (to) std::memcpy(to, shared(from + place), kUnit);
  });
}

}  // namespace ptx

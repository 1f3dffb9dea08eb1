// The logits product with exponentials in its epilogue, on CUTLASS's collectives for sm_90: each tile of the product
// leaves its accumulators as exponentials in bf16 and their sums over the tile's columns. See exponentials.h.
//
// The epilogue is a graph of CUTLASS's visitors with three of our own: an exponential that knows its column, to leave
// the label's out, and for softcaps and metrics the same in steps, between which sums and maxima are taken.
#include "exponentials.h"

#ifdef DFT_CUTLASS
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "arithmetic.h"

namespace dft::cuda {
namespace {

namespace fusion = cutlass::epilogue::fusion;
using M = Math<float>;
using cute::_0;
using cute::_1;
using cute::_2;

// What our visitors have in common: no memory, no loads, parameters that are their arguments
template <class Given>
struct Visitor {
  using Arguments = Given;
  using Params = Given;
  struct SharedStorage {};
  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& given, void*) {
    return given;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  CUTLASS_HOST_DEVICE Visitor() {}
  CUTLASS_HOST_DEVICE Visitor(const Params& given, const SharedStorage&) : params(given) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::ProducerLoadArgs<Args...>&) {
    return fusion::EmptyProducerLoadCallbacks{};
  }
  Params params;
};

// The column of a number, from its place in the tile
template <class Coordinates>
struct Columns {
  Coordinates in_tile;  // of this thread's numbers, relative to its first
  int first;            // the column of that
  CUTLASS_DEVICE int operator()(int i, int epi_m, int epi_n) const {
    return first + int(cute::get<1>(in_tile(cute::_, cute::_, cute::_, epi_m, epi_n)(i)));
  }
};
template <class Args>
CUTLASS_DEVICE auto columns_of(const Args& args) {
  const int vocab = int(cute::get<1>(args.problem_shape_mnkl));
  return Columns<decltype(args.tCcD)>{args.tCcD, vocab - int(cute::get<1>(args.residue_tCcD))};
}

struct Scaled {
  float by;  // scale log2 e
};
struct Capped {
  float scale, cap, inverse_cap;  // cap 0: none
};
struct Nothing {};

// e = exp(scale accumulator - shift)
struct Exponential : Visitor<Scaled> {
  using Visitor::Visitor;
  template <class Place>
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    Place column;
    float by;
    CUTLASS_DEVICE Callbacks(const Place& place, float by) : column(place), by(by) {}
    template <class A, class S, class L, int Count>
    CUTLASS_DEVICE auto visit(const cutlass::Array<A, Count>&, int epi_v, int epi_m, int epi_n,
                              const cutlass::Array<float, Count>& accumulators, const cutlass::Array<S, Count>& shift,
                              const cutlass::Array<L, Count>& label) const {
      cutlass::Array<float, Count> e;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Count; i++) {
        const float x = M::exp2(fmaf(accumulators[i], by, shift[i] * -M::kLog2E));
        e[i] = float(column(epi_v * Count + i, epi_m, epi_n)) == label[i] ? 0.0f : x;
      }
      return e;
    }
  };
  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    const auto place = columns_of(args);
    return Callbacks<decltype(place)>(place, params.by);
  }
};

// d = z - shift, -inf for the label
struct Difference : Visitor<Capped> {
  using Visitor::Visitor;
  template <class Place>
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    Place column;
    Capped finish;
    CUTLASS_DEVICE Callbacks(const Place& place, const Capped& finish) : column(place), finish(finish) {}
    template <class A, int Count>
    CUTLASS_DEVICE auto visit(const cutlass::Array<A, Count>&, int epi_v, int epi_m, int epi_n,
                              const cutlass::Array<float, Count>& accumulators,
                              const cutlass::Array<float, Count>& bias,
                              const cutlass::Array<float, Count>& shift,
                              const cutlass::Array<float, Count>& label) const {
      cutlass::Array<float, Count> d;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Count; i++) {
        float z = (accumulators[i] + bias[i]) * finish.scale;
        if (finish.cap != 0.0f) z = finish.cap * M().tanh(z * finish.inverse_cap);
        d[i] = float(column(epi_v * Count + i, epi_m, epi_n)) == label[i] ? -INFINITY : z - shift[i];
      }
      return d;
    }
  };
  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    const auto place = columns_of(args);
    return Callbacks<decltype(place)>(place, params);
  }
};

// A function of numbers alone, made a visitor
template <class Function, class Given>
struct Pointwise : Visitor<Given> {
  using Visitor<Given>::Visitor;
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    Given given;
    CUTLASS_DEVICE explicit Callbacks(const Given& given) : given(given) {}
    template <class A, int Count, class... Inputs>
    CUTLASS_DEVICE auto visit(const cutlass::Array<A, Count>&, int, int, int, const Inputs&... inputs) const {
      cutlass::Array<float, Count> y;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Count; i++) y[i] = Function::of(given, inputs[i]...);
      return y;
    }
  };
  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>&) {
    return Callbacks(this->params);
  }
};
struct Power {  // e = exp(d)
  CUTLASS_DEVICE static float of(const Nothing&, float d) { return M::exp2(d * M::kLog2E); }
};
struct Moment {  // e d, the label's 0
  CUTLASS_DEVICE static float of(const Nothing&, float e, float d) { return e > 0.0f ? e * d : 0.0f; }
};
struct Bent {  // e (1 - (z / cap)^2); the sums are only here to be taken
  CUTLASS_DEVICE static float of(const Capped& finish, float e, float d, float shift, float) {
    const float bent = finish.cap != 0.0f && e > 0.0f ? (d + shift) * finish.inverse_cap : 0.0f;
    return e * (1.0f - bent * bent);
  }
};

using Number = cutlass::bfloat16_t;
using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
using Cluster = cute::Shape<_2, _1, _1>;
static_assert(cute::size<0>(Tile{}) == kExponentialRows && cute::size<1>(Tile{}) == kExponentialColumns);
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

using Accumulators = fusion::Sm90AccFetch;
using PerRow = fusion::Sm90ColBroadcast<0, Tile, float, float>;
using PerColumn = fusion::Sm90RowBroadcast<0, Tile, float, float>;
template <template <class> class Join>  // over a tile's columns, into [tiles, rows]; columns beyond V are left out
using Reduction = fusion::Sm90ColReduction<Join, Join, Join, 0, Tile, float, float, kRound, cute::Stride<_1, _0, _0>, 4,
                                           false, false, true>;
using Total = Reduction<cutlass::plus>;
template <class T>
using Larger = cutlass::maximum<T>;

using Plain = fusion::Sm90EVT<Total, fusion::Sm90EVT<Exponential, Accumulators, PerRow, PerRow>>;

// 0 accumulators, 1 bias, 2 shift, 3 label, 4 d, 5 its maximum, 6 e, 7 its sum, 8 e d, 9 its sum, 10 what is written
template <int... I>
using From = cute::seq<I...>;
using Rich = fusion::Sm90TopologicalVisitor<
    float,
    cute::tuple<From<>, From<>, From<>, From<>, From<0, 1, 2, 3>, From<4>, From<5>, From<6>, From<7, 5>, From<8>,
                From<7, 5, 2, 9>>,
    Accumulators, PerColumn, PerRow, PerRow, Difference, Reduction<Larger>, Pointwise<Power, Nothing>, Total,
    Pointwise<Moment, Nothing>, Total, Pointwise<Bent, Capped>>;

template <class Fusion>
struct Product {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor, 8, Number,
      cutlass::layout::RowMajor, 8, cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Number, cutlass::layout::RowMajor, 8, Number,
      cutlass::layout::ColumnMajor, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Device::Arguments arguments(const ExponentialArguments& a,
                                              const typename Fusion::Arguments& fused) {
    const int rows = int(a.rows), vocab = int(a.vocab), width = int(a.width);
    typename Device::Arguments out{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {rows, vocab, width, 1},
        {static_cast<const Number*>(a.hidden), {a.hidden_stride, _1{}, 0}, static_cast<const Number*>(a.weight),
         {a.weight_stride, _1{}, 0}},
        {fused, nullptr, {}, static_cast<Number*>(a.out), {a.out_stride, _1{}, 0}}};
    cudaGetDevice(&out.hw_info.device_id);
    out.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(out.hw_info.device_id);
    out.scheduler.max_swizzle_size = 8;  // neighbours in time share rows of the weight in the cache
    return out;
  }
  static const char* launch(const typename Device::Arguments& arguments, void* workspace, CUstream_st* stream) {
    Device product;
    cutlass::Status status = product.can_implement(arguments);
    if (status == cutlass::Status::kSuccess) status = product.initialize(arguments, workspace, stream);
    if (status == cutlass::Status::kSuccess) status = product.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }
};

// f(Product, arguments) with the epilogue that a call takes
template <class F>
auto with_product(const ExponentialArguments& a, F f) {
  const float scale = float(a.finish.scale), cap = float(a.finish.cap);
  if (!a.moments) {
    using P = Product<Plain>;
    return f(P(), P::arguments(a, {{{}, {a.shift}, {a.label}, {scale * M::kLog2E}}, {a.sums}}));
  }
  using P = Product<Rich>;
  const Capped finish = {scale, cap, cap == 0.0f ? 0.0f : 1.0f / cap};
  return f(P(), P::arguments(a, {{}, {a.bias}, {a.shift}, {a.label}, finish, {a.tops, -INFINITY}, {}, {a.sums}, {},
                                 {a.moments}, finish}));
}

}  // namespace

bool has_exponentials() { return true; }

int64_t exponentials_workspace(const ExponentialArguments& a) {
  return with_product(a, [](auto product, const auto& arguments) {
    return int64_t(decltype(product)::Device::get_workspace_size(arguments));
  });
}

const char* launch_exponentials(const ExponentialArguments& a, void* workspace, CUstream_st* stream) {
  if (a.rows == 0) return nullptr;
  return with_product(a, [&](auto product, const auto& arguments) {
    return decltype(product)::launch(arguments, workspace, stream);
  });
}

}  // namespace dft::cuda

#elif !defined(DFT_CUDA_ON_HOST)  // tests/cuda_on_host/exponentials.cpp

namespace dft::cuda {

bool has_exponentials() { return false; }
int64_t exponentials_workspace(const ExponentialArguments&) { return 0; }
const char* launch_exponentials(const ExponentialArguments&, void*, CUstream_st*) { return "built without CUTLASS"; }

}  // namespace dft::cuda
#endif

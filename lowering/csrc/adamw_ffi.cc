// The binding to XLA: decodes one custom call and runs it on XLA's own threads.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "isa/isa.h"
#include "parallel.h"
#include "tree.h"
#include "xla/ffi/api/ffi.h"

#define ADAMW_EXPORT extern "C" __attribute__((visibility("default")))

namespace adamw {
namespace {

namespace ffi = xla::ffi;
using Int64s = ffi::Span<const std::int64_t>;

// Below this many elements, waking another thread costs more than it saves.
constexpr std::int64_t kMinParallel = 64 * 1024;
constexpr std::int64_t kMinChunk = 16 * 1024;
constexpr std::int64_t kMaxChunk = 256 * 1024;
constexpr std::int64_t kChunksPerThread = 4;

std::optional<DType> DTypeOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16: return DType::kBF16;
    case ffi::DataType::F16: return DType::kF16;
    case ffi::DataType::F32: return DType::kF32;
    case ffi::DataType::F64: return DType::kF64;
    case ffi::DataType::S16: return DType::kI16;
    default: return std::nullopt;
  }
}

Operand OperandOf(const ffi::AnyBuffer& x) {
  return {x.untyped_data(), x.dimensions().begin()};
}

#define ADAMW_PARAMETER(name) , bool name
#define ADAMW_VALUE(name) name,

ffi::Error UpdateLeaves(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                        Int64s leaves, Int64s groups,
                        std::int64_t batch_rank ADAMW_OPTIONS(ADAMW_PARAMETER)) {
  const Options options = {ADAMW_OPTIONS(ADAMW_VALUE)};
  if (delta) return ffi::Error(ffi::ErrorCode::kUnimplemented, "adamw_xla: no delta form here");
  std::vector<Kind> kinds = {kParams, kGrads};
  if (words) kinds.push_back(kWords);
  if (!words) kinds.insert(kinds.end(), {kM, kV});
  if (amsgrad) kinds.push_back(kVMax);
  if (ema) kinds.push_back(kEma);
  if (split_master) kinds.push_back(kRemainder);
  const std::size_t n = leaves.size(), first = 1 + leaf_scale;
  const bool sums = tree_sums || leaf_sums;
  // Operands behind the leaves are only waited for: see cpu/kernel.py.
  if (groups.size() != n || args.size() < first + n * kinds.size() ||
      rets.size() != n * (kinds.size() - 1) + sums) {
    return ffi::Error::InvalidArgument("adamw_xla: the operands do not fit the attributes");
  }
  const auto arg = [&](std::size_t i) { return *args.get<ffi::AnyBuffer>(i); };

  Tree::Scalars scalars = {};
  const ffi::AnyBuffer hyper = arg(0);
  scalars.hyper = OperandOf(hyper);
  scalars.groups = hyper.dimensions()[batch_rank];
  scalars.wide = hyper.element_type() == ffi::DataType::F64;
  scalars.batch_rank = static_cast<int>(batch_rank);
  scalars.options = options;
  if (leaf_scale) {
    scalars.leaf_scale = OperandOf(arg(1));
    scalars.leaves = arg(1).dimensions()[batch_rank];
  }

  std::vector<Leaf> tree(n);
  for (std::size_t i = 0; i < n; ++i) {
    Leaf& leaf = tree[i];
    leaf = {};
    leaf.group = groups[i];
    leaf.index = leaves[i];
    for (std::size_t k = 0, r = 0; k < kinds.size(); ++k) {
      const ffi::AnyBuffer in = arg(first + k * n + i);
      const std::optional<DType> dtype = DTypeOf(in.element_type());
      if (!dtype) return ffi::Error::InvalidArgument("adamw_xla: an operand's dtype is unknown");
      leaf.dtype[kinds[k]] = *dtype;
      leaf.in[kinds[k]] = OperandOf(in);
      if (kinds[k] == kGrads) continue;
      const ffi::AnyBuffer out = **rets.get<ffi::AnyBuffer>(r++ * n + i);
      leaf.out[kinds[k]] = out.untyped_data();
      const auto dims = out.dimensions();
      leaf.batch = dims.begin();
      leaf.rows = leaf.size = 1;
      for (std::size_t d = 0; d < dims.size(); ++d) {
        (static_cast<std::int64_t>(d) < batch_rank ? leaf.rows : leaf.size) *= dims[d];
      }
    }
  }

  Tree work(scalars, std::move(tree));
  const bool alone = work.elements() < kMinParallel;
  const std::int64_t threads = alone ? 1 : std::max<std::int64_t>(pool.num_threads(), 1);
  const std::int64_t even = work.size() / (threads * kChunksPerThread);
  const std::int64_t chunk =
      std::clamp(even, kMinChunk, kMaxChunk) / work.grain() * work.grain();
  const UpdateFn update = BestIsa().update;
  ParallelFor((work.size() + chunk - 1) / chunk, threads - 1,
              [&pool](auto task) { pool.Schedule(std::move(task)); },
              [&](std::int64_t i) { work.Update(i * chunk, (i + 1) * chunk, update); });
  if (sums) {
    // [*batch, kinds] or [*batch, leaves, kinds], float64.
    const ffi::AnyBuffer out = **rets.get<ffi::AnyBuffer>(rets.size() - 1);
    work.WriteSums(out.dimensions().begin(), out.typed_data<double>());
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace adamw

#define ADAMW_ATTRIBUTE(name) .Attr<bool>(#name)

ADAMW_EXPORT XLA_FFI_Error* AdamWXlaUpdate(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamWXlaUpdate, adamw::UpdateLeaves,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<adamw::Int64s>("leaves")
                                  .Attr<adamw::Int64s>("groups")
                                  .Attr<std::int64_t>("batch_rank")
                                  ADAMW_OPTIONS(ADAMW_ATTRIBUTE));

// The slots of hyper and the options, in this library's order, for cpu/library.py to compare with
// its own.
#define ADAMW_NAME(name) #name " "
ADAMW_EXPORT const char* AdamWXlaSlots() { return ADAMW_SLOTS(ADAMW_NAME); }
ADAMW_EXPORT const char* AdamWXlaOptions() { return ADAMW_OPTIONS(ADAMW_NAME); }
#undef ADAMW_NAME

// The version of XLA's FFI that this library speaks, and the jaxlib whose headers had it.
#define ADAMW_TEXT_OF(x) #x
#define ADAMW_TEXT(x) ADAMW_TEXT_OF(x)
ADAMW_EXPORT const char* AdamWXlaFfiVersion() {
  return ADAMW_TEXT(XLA_FFI_API_MAJOR) "." ADAMW_TEXT(XLA_FFI_API_MINOR);
}
ADAMW_EXPORT const char* AdamWXlaJaxlib() { return ADAMW_JAXLIB; }

// The instruction set that this processor gets.
ADAMW_EXPORT const char* AdamWXlaIsa() { return adamw::BestIsa().name; }

#include "tree.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace adamw {
namespace {

std::int64_t BytesOf(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
    case DType::kF16:
    case DType::kI16: return 2;
    case DType::kF32: return 4;
    case DType::kF64: return 8;
  }
  return 0;
}

// XLA runs CPU programs with subnormals flushed to zero, but not on every thread that
// can come here; an element must not depend on its thread.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (1ull << 24)) : "memory");
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }

 private:
  unsigned long long saved_;
#endif
};

// Which of an operand's rows belongs to row `row` of the batch `batch`.
std::int64_t RowOf(std::int64_t row, const std::int64_t* batch, const std::int64_t* own, int rank) {
  if (rank == 1) return own[0] == 1 ? 0 : row;  // divisions cost more than short rows
  std::int64_t index = 0, stride = 1;
  for (int d = rank - 1; d >= 0; --d) {
    if (own[d] != 1) index += row % batch[d] * stride;
    row /= batch[d];
    stride *= own[d];
  }
  return index;
}

double Read(const void* data, std::int64_t index, bool wide) {
  return wide ? static_cast<const double*>(data)[index]
              : static_cast<double>(static_cast<const float*>(data)[index]);
}

// Leaves an operand as it is.
void Keep(const Slice& slice, Kind k) {
  if (slice.out[k] == nullptr || slice.out[k] == slice.in[k]) return;
  std::memcpy(slice.out[k], slice.in[k], slice.size * BytesOf(slice.dtype[k]));
}

bool SameBatch(const std::int64_t* a, const std::int64_t* b, int rank) {
  return std::equal(a, a + rank, b);
}

}  // namespace

Tree::Tree(const Scalars& scalars, std::vector<Leaf> leaves)
    : scalars_(scalars),
      sums_(scalars.options.tree_sums || scalars.options.leaf_sums),
      leaves_(std::move(leaves)) {
  const int rank = scalars_.batch_rank;
  const auto is_one = [rank](const Operand& x) {
    return x.data == nullptr || std::all_of(x.batch, x.batch + rank, [](auto n) { return n == 1; });
  };
  const bool one_row = is_one(scalars_.hyper) && is_one(scalars_.leaf_scale);
  ends_.reserve(leaves_.size());
  std::int64_t end = 0, pieces = 0;
  for (Leaf& leaf : leaves_) {
    const auto is_full = [&](const Operand& x) {
      return x.data == nullptr || SameBatch(x.batch, leaf.batch, rank);
    };
    // A batch that shares its scalars and repeats nothing is just a larger leaf; but each of
    // its members has sums of its own.
    if (!sums_ && one_row && std::all_of(leaf.in, leaf.in + kNumKinds, is_full)) {
      leaf.size *= leaf.rows;
      leaf.rows = std::min<std::int64_t>(leaf.rows, 1);
    }
    const std::int64_t elements = leaf.rows * leaf.size;
    end += (elements + grain() - 1) / grain() * grain();
    ends_.push_back(end);
    elements_ += elements;
    if (!sums_) continue;
    firsts_.push_back(pieces);
    pieces += leaf.rows + elements / kSumBlock + 1;
  }
  squares_.resize(pieces);
}

void Tree::Update(std::int64_t begin, std::int64_t end, UpdateFn update) {
  const FlushSubnormals flush;
  auto it = std::upper_bound(ends_.begin(), ends_.end(), begin);
  for (; it != ends_.end() && begin < end; begin = *it++) {
    const std::size_t i = it - ends_.begin();
    const Leaf& leaf = leaves_[i];
    const std::int64_t start = i == 0 ? 0 : ends_[i - 1];
    const std::int64_t stop = std::min(end - start, leaf.rows * leaf.size);
    UpdateLeaf(i, begin - start, stop, update);
  }
}

void Tree::UpdateLeaf(std::size_t i, std::int64_t begin, std::int64_t end, UpdateFn update) {
  const Leaf& leaf = leaves_[i];
  Slice slice = {};
  std::copy(leaf.dtype, leaf.dtype + kNumKinds, slice.dtype);
  slice.stochastic = scalars_.options.stochastic;
  slice.grad_sums = scalars_.options.grad_sums;
  slice.small_unit = scalars_.wide ? 0x1p-532 : 0x1p-84;
  const double infinity = std::numeric_limits<double>::infinity();
  slice.opposed = scalars_.options.cautious ? 0.0 : -infinity;
  const bool narrow = leaf.dtype[kParams] == DType::kBF16;
  while (begin < end) {
    const std::int64_t row = leaf.rows == 1 ? 0 : begin / leaf.size;
    const std::int64_t first = begin - row * leaf.size;
    slice.size = std::min(end - begin, leaf.size - first);
    for (int k = 0; k < kNumKinds; ++k) {
      const std::int64_t bytes = BytesOf(leaf.dtype[k]);
      slice.in[k] = nullptr;
      slice.out[k] = nullptr;
      if (const Operand& x = leaf.in[k]; x.data != nullptr) {
        // Several rows have their own index; a merged batch has one row, at 0.
        const std::int64_t at =
            leaf.rows == 1 ? 0 : RowOf(row, leaf.batch, x.batch, scalars_.batch_rank);
        slice.in[k] = static_cast<const char*>(x.data) + (at * leaf.size + first) * bytes;
      }
      if (leaf.out[k] != nullptr) slice.out[k] = static_cast<char*>(leaf.out[k]) + begin * bytes;
    }
    if (sums_) {
      slice.squares = &squares_[firsts_[i] + row + begin / kSumBlock];
      slice.before = begin % kSumBlock;
    }
    slice.kept = !SetScalars(leaf, row, slice);
    if (slice.kept) {
      for (int k = 0; k < kNumKinds; ++k) Keep(slice, static_cast<Kind>(k));
    } else if (!narrow) {
      Keep(slice, kRemainder);
    }
    if (sums_ || !slice.kept) update(slice);
    begin += slice.size;
  }
}

Squares Tree::RowSquares(std::size_t i, std::int64_t row) const {
  Squares total = {};
  const std::int64_t size = leaves_[i].size, begin = row * size, end = begin + size;
  const Squares* const pieces = squares_.data() + firsts_[i] + row;
  for (std::int64_t b = begin / kSumBlock; b * kSumBlock < end; ++b) {
    total.grads += pieces[b].grads;
    total.small_grads += pieces[b].small_grads;
    total.params += pieces[b].params;
    total.updates += pieces[b].updates;
  }
  return total;
}

void Tree::WriteSums(const std::int64_t* batch, double* out) const {
  const int rank = scalars_.batch_rank;
  const Options& options = scalars_.options;
  const int kinds = options.grad_sums ? 4 : 2;
  const std::int64_t rows =
      std::accumulate(batch, batch + rank, std::int64_t{1}, std::multiplies<>());
  for (std::int64_t row = 0; row < rows; ++row) {
    if (options.tree_sums) std::fill_n(out, kinds, 0.0);
    for (std::size_t i = 0; i < leaves_.size(); ++i) {
      if (options.leaf_sums) std::fill_n(out, kinds, 0.0);
      const Squares own = RowSquares(i, RowOf(row, batch, leaves_[i].batch, rank));
      double* to = out;
      if (options.grad_sums) {
        *to++ += own.grads;
        *to++ += own.small_grads;
      }
      *to++ += own.params;
      *to++ += own.updates;
      if (options.leaf_sums) out = to;
    }
    if (options.tree_sums) out += kinds;
  }
}

// False where the step is to be skipped.
bool Tree::SetScalars(const Leaf& leaf, std::int64_t row, Slice& slice) const {
  const auto row_of = [&](const Operand& x) {
    return leaf.rows == 1 ? 0 : RowOf(row, leaf.batch, x.batch, scalars_.batch_rank);
  };
  const std::int64_t at = (row_of(scalars_.hyper) * scalars_.groups + leaf.group) * kNumSlots;
  for (int s = 0; s < kNumSlots; ++s) {
    slice.slots[s] = Read(scalars_.hyper.data, at + s, scalars_.wide);
  }
  slice.leaf_scale = 1.0;
  if (scalars_.leaf_scale.data != nullptr) {
    const std::int64_t column = row_of(scalars_.leaf_scale) * scalars_.leaves + leaf.index;
    slice.leaf_scale = Read(scalars_.leaf_scale.data, column, scalars_.wide);
  }
  const Options& options = scalars_.options;
  if (!options.clip_value) slice.slots[CLIP_VALUE] = std::numeric_limits<double>::infinity();
  if (!options.ema_overwrite) slice.slots[EMA_OVERWRITE] = 0.0;
  if (!options.epsilon_root) slice.slots[EPSILON_ROOT] = 0.0;
  if (!options.nesterov) slice.slots[GRAD_STEP_SIZE] = 0.0;
  if (!options.skip) return true;
  // Compared in the dtype of the arithmetic, as the StableHLO path does.
  return leaf.dtype[kParams] == DType::kF64 ? slice.slots[APPLY] != 0
                                            : static_cast<float>(slice.slots[APPLY]) != 0;
}

}  // namespace adamw

// Sums of squares of what an update reads and writes, block by block.
//
// Each block is added in lanes, whatever the vectors' width, and the lanes by halves: the
// same bits on any instruction set. A lane is the sum of kSumBlock / kLanes squares, in the
// compute type: of float32 a block's sum is off by at most 1 + 255 + 5 half units in the last
// place, 1.6e-5 of it. Blocks are added in float64.
// A part of adamw.h, which says how it is compiled.

#ifndef ADAMW_XLA_SUMS_H_
#define ADAMW_XLA_SUMS_H_

#include "dtypes.h"
#include "slice.h"

namespace adamw::ADAMW_ISA {

constexpr int kLanes = 32;
static_assert(kSumBlock % kLanes == 0, "a lane for each element of a block");

template <typename C>
struct Lanes {
  alignas(64) C grads[kLanes], params[kLanes], updates[kLanes];
};

template <int n, typename C>
inline C ByHalves(const C* x) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    alignas(64) C sums[n / 2];
    for (int i = 0; i < n / 2; ++i) sums[i] = x[i] + x[i + n / 2];
    return ByHalves<n / 2>(sums);
  }
}

// As one block, of numbers in C.
template <typename C, typename T>
double SumOfSquares(const T* x, int64_t n) {
  alignas(64) C sums[kLanes] = {};
  const auto add = [&sums](T element, int lane) {
    const C y = static_cast<C>(Widen(element));
    sums[lane] += y * y;
  };
  int64_t start = 0;
  for (; start + kLanes <= n; start += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(x[start + lane], lane);
  }
  for (int lane = 0; lane < n - start; ++lane) add(x[start + lane], lane);
  return ByHalves<kLanes>(sums);
}

// Of gradients whose squares C may not hold: in float64, and in a unit.
template <typename C, typename T>
void SumLargeSquares(const T* x, int64_t n, double unit, Squares& squares) {
  squares.grads = squares.small_grads = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double y = static_cast<C>(Widen(x[i])), small = y * unit;
    squares.grads += y * y;
    squares.small_grads += small * small;
  }
}

// f(elements from `start` on), whatever their dtype.
template <typename F>
void OnElements(DType dtype, const void* x, int64_t start, const F& f) {
  switch (dtype) {
    case DType::kBF16: return f(static_cast<const BF16*>(x) + start);
    case DType::kF16: return f(static_cast<const F16*>(x) + start);
    case DType::kF32: return f(static_cast<const float*>(x) + start);
    case DType::kF64: return f(static_cast<const double*>(x) + start);
    case DType::kI16: return;  // no number
  }
}

template <typename C>
double SumStored(const Slice& slice, Kind kind, int64_t start, int64_t n) {
  const void* const x = kind == kGrads ? slice.in[kind] : slice.out[kind];
  double sum = 0;
  OnElements(slice.dtype[kind], x, start, [&](const auto* y) { sum = SumOfSquares<C>(y, n); });
  return sum;
}

// From the sum of the gradients' squares, that in the small unit; and both anew if it overflowed.
template <typename C>
void SetSmallGrads(const Slice& slice, int64_t start, int64_t n, Squares& squares) {
  const double unit = slice.small_unit;
  squares.small_grads = squares.grads * unit * unit;  // the square of the unit alone may be 0
  if (squares.grads < __builtin_inf()) return;
  OnElements(slice.dtype[kGrads], slice.in[kGrads], start,
             [&](const auto* x) { SumLargeSquares<C>(x, n, unit, squares); });
}

// Of a block's elements [start, start + n), which have been updated.
template <typename C>
Squares SquaresOf(const Slice& slice, int64_t start, int64_t n, const Lanes<C>& sums) {
  Squares squares = {ByHalves<kLanes>(sums.grads), 0, ByHalves<kLanes>(sums.params),
                     ByHalves<kLanes>(sums.updates)};
  if (slice.grad_sums) SetSmallGrads<C>(slice, start, n, squares);
  // The loop has not seen these as they are stored.
  if (slice.dtype[kParams] == DType::kF16) squares.params = SumStored<C>(slice, kParams, start, n);
  return squares;
}

// How many elements from `start` on are in one block.
inline int64_t LeftOfBlock(const Slice& slice, int64_t start) {
  const int64_t left = kSumBlock - (slice.before + start) % kSumBlock;
  return left < slice.size - start ? left : slice.size - start;
}

// The sums of a slice that is kept as it is.
template <typename C>
void SumKept(const Slice& slice) {
  Squares* squares = slice.squares;
  for (int64_t start = 0, n; start < slice.size; start += n, ++squares) {
    n = LeftOfBlock(slice, start);
    *squares = {SumStored<C>(slice, kGrads, start, n), 0, SumStored<C>(slice, kParams, start, n), 0};
    if (slice.grad_sums) SetSmallGrads<C>(slice, start, n, *squares);
  }
}

}  // namespace adamw::ADAMW_ISA

#endif  // ADAMW_XLA_SUMS_H_

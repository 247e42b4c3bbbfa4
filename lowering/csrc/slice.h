// What the work splitter hands to the arithmetic: plain data, no code.
//
// Nothing in here may be a function: this header is compiled for several instruction
// sets, and the linker keeps one copy of an inline function for all of them.

#ifndef ADAMW_XLA_SLICE_H_
#define ADAMW_XLA_SLICE_H_

#include <cstdint>

namespace adamw {

// Columns of hyper, in the order of contract.Slot; cpu/library.py compares the two.
#define ADAMW_SLOTS(X)                                                          \
  X(GRAD_SCALE) X(STEP_SIZE) X(V_CORRECTION) X(DECAY_RATE) X(BETA_1)            \
  X(ONE_MINUS_BETA_1) X(BETA_2) X(ONE_MINUS_BETA_2) X(EPSILON) X(CLIP_VALUE)    \
  X(EMA_MOMENTUM) X(ONE_MINUS_EMA_MOMENTUM) X(EMA_OVERWRITE) X(APPLY)           \
  X(EPSILON_ROOT) X(GRAD_STEP_SIZE) X(SALT)

#define ADAMW_ENUMERATOR(name) name,
enum Slot { ADAMW_SLOTS(ADAMW_ENUMERATOR) kNumSlots };
#undef ADAMW_ENUMERATOR

// What kind of update it is, in the order of library.attributes; likewise.
#define ADAMW_OPTIONS(X)                                                        \
  X(amsgrad) X(ema) X(ema_overwrite) X(clip_value) X(skip) X(epsilon_root)      \
  X(nesterov) X(cautious) X(words) X(stochastic) X(split_master) X(delta) X(leaf_scale) \
  X(tree_sums) X(leaf_sums) X(grad_sums)

#define ADAMW_FIELD(name) bool name;
struct Options { ADAMW_OPTIONS(ADAMW_FIELD) };
#undef ADAMW_FIELD

// What a leaf brings. All but the gradients come back.
enum Kind { kParams, kGrads, kM, kV, kWords, kVMax, kEma, kRemainder, kNumKinds };

enum class DType : std::uint8_t { kBF16, kF16, kF32, kF64, kI16 };

// Sums of squares over some elements of a leaf; the small gradients' are those of a unit times them.
struct Squares {
  double grads, small_grads, params, updates;
};

// A leaf is summed in blocks of so many elements, counted from its first, each row by itself: so
// sums depend on no chunk. Of float32, blocks of 1,024 cost 10 % of the time in the cache.
constexpr std::int64_t kSumBlock = 8192;

// Consecutive elements of one leaf that read one row of hyper.
struct Slice {
  std::int64_t size;
  // Null: in[] of what the update does not have, and out[kGrads]. A result may be the very
  // buffer of what it replaces, and overlaps nothing else.
  const void* in[kNumKinds];
  void* out[kNumKinds];
  DType dtype[kNumKinds];  // a result has the dtype of what it replaces
  double slots[kNumSlots];
  double leaf_scale;
  double opposed;   // a product of param and step below it lets nothing decay
  bool stochastic;  // of Options
  bool kept;        // nothing is to be updated, only summed
  // What sums there are: one for each block that the slice has a part of, or null.
  Squares* squares;
  std::int64_t before;  // elements of the first block that are not the slice's
  bool grad_sums;       // of Options
  double small_unit;    // see contract.small_unit
};

using UpdateFn = void (*)(const Slice&);

}  // namespace adamw

#endif  // ADAMW_XLA_SLICE_H_

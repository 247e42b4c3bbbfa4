// One AdamW step over a slice of a leaf: the arithmetic, for every dtype and option.
//
// contract.py has the equations. They are computed in float64 for float64 params and
// in float32 for all others. The loop reads bfloat16 params, their gradients and words as
// they lie; operands of another dtype pass through a block of scratch that stays in the
// first-level cache. Options that cost little in it are data: no clipping is clipping at
// infinity, no leaf_scale a scale of one, no nesterov a step of zero along the gradient,
// all exact.
//
// Each instruction set compiles this header into a namespace of its own (ADAMW_ISA).
// It uses no function of the standard library, for the reason that slice.h gives.
// The build turns contraction to FMA off: an element then has the same bits in the body
// and in the tail of a vector loop, on any number of threads and any instruction set.

#ifndef ADAMW_XLA_ADAMW_H_
#define ADAMW_XLA_ADAMW_H_

#include "dtypes.h"
#include "formats.h"
#include "slice.h"
#include "sums.h"

namespace adamw::ADAMW_ISA {

// StableHLO's maximum: a NaN on either side is the result. As two selects, of which the
// first is one instruction; GCC does not vectorize the "or" of conditions.
template <typename C>
inline C Max(C a, C b) {
  const C larger = a > b ? a : b;
  return a != a ? a : larger;
}

inline float Sqrt(float x) { return __builtin_sqrtf(x); }
inline double Sqrt(double x) { return __builtin_sqrt(x); }

// What an element's moments are, and what becomes of a new param that is narrow.
enum class State { kPlain, kAmsgrad, kWords };
enum class Rounding { kNearest, kStochastic, kSplit };

// Where the operands of a run of elements begin. Params are of type P, gradients of G, words
// and remainders of 16 bits, all others of the compute type.
struct Operands {
  const void* in[kNumKinds];
  void* out[kNumKinds];
  void* sums;  // Lanes of the compute type, to be added to; or null
};

// With kFew no gradient has a leaf's scale, is clipped or stepped along, no constant is under the
// root and no decay is left out: then what is left out here changes nothing.
template <typename C, typename P, typename G, State kState, Rounding kRounding, bool kWithSums,
          bool kWithEma, bool kFew = false>
void UpdateLoop(const Slice& slice, int64_t n, const Operands& x) {
  constexpr bool kRandom = kState == State::kWords || kRounding == Rounding::kStochastic;
  const auto slot = [&slice](Slot which) { return static_cast<C>(slice.slots[which]); };
  // A bound that is NaN makes all gradients so; the loop's comparisons would pass it over.
  const C bound = slot(CLIP_VALUE);
  const C grad_scale = bound == bound ? slot(GRAD_SCALE) : bound;
  const C leaf_scale = static_cast<C>(slice.leaf_scale);
  const C high = bound, low = -bound;
  const C beta_1 = slot(BETA_1), one_minus_beta_1 = slot(ONE_MINUS_BETA_1);
  const C beta_2 = slot(BETA_2), one_minus_beta_2 = slot(ONE_MINUS_BETA_2);
  const C step_size = slot(STEP_SIZE), decay_rate = slot(DECAY_RATE);
  const C v_correction = slot(V_CORRECTION), epsilon = slot(EPSILON);
  const C epsilon_root = slot(EPSILON_ROOT), grad_step_size = slot(GRAD_STEP_SIZE);
  const C momentum = slot(EMA_MOMENTUM), one_minus_momentum = slot(ONE_MINUS_EMA_MOMENTUM);
  const bool overwrite = slot(EMA_OVERWRITE) != 0;
  const C opposed = static_cast<C>(slice.opposed);
  [[maybe_unused]] const Words words;
  [[maybe_unused]] const uint32_t salt = SaltOf(static_cast<float>(slice.slots[SALT]));

  const P* const p_in = static_cast<const P*>(x.in[kParams]);
  const G* const g_in = static_cast<const G*>(x.in[kGrads]);
  const auto in = [&x](Kind kind) { return static_cast<const C*>(x.in[kind]); };
  const C *const m_in = in(kM), *const v_in = in(kV);
  const C *const v_max_in = in(kVMax), *const ema_in = in(kEma);
  const uint16_t* const words_in = static_cast<const uint16_t*>(x.in[kWords]);
  const int16_t* const remainder_in = static_cast<const int16_t*>(x.in[kRemainder]);
  P* const p_out = static_cast<P*>(x.out[kParams]);
  const auto out = [&x](Kind kind) { return static_cast<C*>(x.out[kind]); };
  C *const m_out = out(kM), *const v_out = out(kV);
  C *const v_max_out = out(kVMax), *const ema_out = out(kEma);
  uint16_t* const words_out = static_cast<uint16_t*>(x.out[kWords]);
  int16_t* const remainder_out = static_cast<int16_t*>(x.out[kRemainder]);

  const auto element = [&](int64_t i, [[maybe_unused]] C& g_sum, [[maybe_unused]] C& p_sum,
                           [[maybe_unused]] C& added_sum) __attribute__((always_inline)) {
    const C grad = Widen(g_in[i]);
    C p;
    if constexpr (kRounding == Rounding::kSplit) {
      p = Join(p_in[i], remainder_in[i]);
    } else {
      p = Widen(p_in[i]);
    }
    [[maybe_unused]] uint32_t random = 0;
    if constexpr (kRandom) random = words.RandomBits(grad, p, salt);
    C m, v;
    if constexpr (kState == State::kWords) {
      const Moments old = words.Decode(words_in[i]);
      m = old.m, v = old.v;
    } else {
      m = m_in[i], v = v_in[i];
    }
    C g = grad_scale * grad;
    if constexpr (!kFew) {
      g = g * leaf_scale;
      g = low > g ? low : g;
      g = high < g ? high : g;
    }
    m = beta_1 * m + one_minus_beta_1 * g;
    v = beta_2 * v + one_minus_beta_2 * (g * g);
    C w = v, along = step_size * m;
    if constexpr (kState == State::kAmsgrad) v_max_out[i] = w = Max(v, v_max_in[i]);
    if constexpr (!kFew) {
      w = w + epsilon_root;
      along = along + grad_step_size * g;
    }
    const C step = along / (Sqrt(w) * v_correction + epsilon);
    C decay = decay_rate * p;
    if constexpr (!kFew) decay = p * step < opposed ? C{0} : decay;
    [[maybe_unused]] const C old = p;
    p = p - (decay + step);
    [[maybe_unused]] C added = decay + step;
    if constexpr (kWithEma) {
      const C ema = momentum * ema_in[i] + one_minus_momentum * p;
      ema_out[i] = ema;
      p = overwrite ? ema : p;
      added = overwrite ? ema - old : added;
    }
    if constexpr (kState == State::kWords) {
      words_out[i] = words.Encode({m, v}, random);
    } else {
      m_out[i] = m;
      v_out[i] = v;
    }
    if constexpr (kRounding == Rounding::kSplit) remainder_out[i] = RemainderOf(p);
    if constexpr (sizeof(P) == sizeof(C)) {
      p_out[i] = p;
    } else {
      uint32_t rounded;
      if constexpr (kRounding == Rounding::kSplit) {
        rounded = ParamOf(p);
      } else if constexpr (kRounding == Rounding::kStochastic) {
        rounded = RoundAtRandom(p, random);
      } else {
        rounded = RoundToBF16(p);
      }
      p_out[i] = UpperHalf(rounded);
      if constexpr (kWithSums) p = FloatOf(rounded & kHigh);
    }
    if constexpr (kWithSums) {
      g_sum += grad * grad;
      p_sum += p * p;
      added_sum += added * added;
    }
  };
  if constexpr (kWithSums) {
    Lanes<C>& sums = *static_cast<Lanes<C>*>(x.sums);
    Lanes<C> own = sums;
    int64_t start = 0;
    for (; start + kLanes <= n; start += kLanes) {
      ADAMW_VECTORIZE
      for (int lane = 0; lane < kLanes; ++lane) {
        element(start + lane, own.grads[lane], own.params[lane], own.updates[lane]);
      }
    }
    ADAMW_VECTORIZE
    for (int lane = 0; lane < n - start; ++lane) {
      element(start + lane, own.grads[lane], own.params[lane], own.updates[lane]);
    }
    sums = own;
  } else {
    C none = 0;
    ADAMW_VECTORIZE
    for (int64_t i = 0; i < n; ++i) element(i, none, none, none);
  }
}

inline bool HasFew(const Slice& slice) {
  const double* const slots = slice.slots;
  return slice.leaf_scale == 1 && slots[CLIP_VALUE] == __builtin_inf() &&
         slots[EPSILON_ROOT] == 0 && slots[GRAD_STEP_SIZE] == 0 &&
         slice.opposed == -__builtin_inf();
}

using Loop = void (*)(const Slice&, int64_t, const Operands&);

template <typename C, typename P, typename G, Rounding kRounding, bool kWithSums>
Loop Choose(const Slice& slice) {
  const bool ema = slice.in[kEma] != nullptr;
  // Words and sums bind loops by their operations; the others are bound by memory.
  const bool few = !ema && HasFew(slice);
  if (slice.in[kWords] != nullptr) {
    if constexpr (sizeof(C) == sizeof(float)) {
      if (few) return UpdateLoop<C, P, G, State::kWords, kRounding, kWithSums, false, true>;
      return ema ? UpdateLoop<C, P, G, State::kWords, kRounding, kWithSums, true>
                 : UpdateLoop<C, P, G, State::kWords, kRounding, kWithSums, false>;
    }
  }
  if (slice.in[kVMax] != nullptr) {
    return ema ? UpdateLoop<C, P, G, State::kAmsgrad, kRounding, kWithSums, true>
               : UpdateLoop<C, P, G, State::kAmsgrad, kRounding, kWithSums, false>;
  }
  if constexpr (kWithSums) {
    if (few) return UpdateLoop<C, P, G, State::kPlain, kRounding, true, false, true>;
  }
  return ema ? UpdateLoop<C, P, G, State::kPlain, kRounding, kWithSums, true>
             : UpdateLoop<C, P, G, State::kPlain, kRounding, kWithSums, false>;
}

constexpr DType DTypeOf(double) { return DType::kF64; }
constexpr DType DTypeOf(float) { return DType::kF32; }
constexpr DType DTypeOf(BF16) { return DType::kBF16; }

// What the loop does not take as it is stored passes through scratch, in the compute type.
template <typename C, typename P, typename G>
class Pass {
 public:
  explicit Pass(const Slice& slice) : slice_(slice) {
    for (DType& dtype : taken_) dtype = DTypeOf(C{});
    taken_[kParams] = DTypeOf(P{});
    taken_[kGrads] = DTypeOf(G{});
    taken_[kWords] = DType::kBF16;
    taken_[kRemainder] = DType::kI16;
    for (int k = 0; k < kNumKinds; ++k) {
      direct_ &= slice.in[k] == nullptr || slice.dtype[k] == taken_[k];
    }
  }

  // Elements [start, end); adds to the sums, if there are some.
  void Run(Loop loop, int64_t start, int64_t end, Lanes<C>* sums) {
    const int64_t block = direct_ ? end - start : kBlock;
    for (; start < end; start += block) {
      RunBlock(loop, start, end - start < block ? end - start : block, sums);
    }
  }

 private:
  static constexpr int64_t kBlock = 256;

  void RunBlock(Loop loop, int64_t start, int64_t n, Lanes<C>* sums) {
    Operands x = {};
    x.sums = sums;
    for (int k = 0; k < kNumKinds; ++k) {
      if (slice_.in[k] == nullptr) continue;
      if (slice_.dtype[k] == taken_[k]) {
        const int64_t bytes = start * BytesOf(taken_[k]);
        x.in[k] = static_cast<const char*>(slice_.in[k]) + bytes;
        if (slice_.out[k] != nullptr) x.out[k] = static_cast<char*>(slice_.out[k]) + bytes;
      } else {
        Load(slice_.dtype[k], slice_.in[k], start, n, scratch_[k]);
        x.in[k] = x.out[k] = scratch_[k];
      }
    }
    loop(slice_, n, x);
    for (int k = 0; k < kNumKinds; ++k) {
      if (slice_.out[k] == nullptr || slice_.dtype[k] == taken_[k]) continue;
      Store(slice_.dtype[k], scratch_[k], start, n, slice_.out[k]);
    }
  }

  alignas(64) C scratch_[kNumKinds][kBlock];
  const Slice& slice_;
  DType taken_[kNumKinds];
  bool direct_ = true;
};

template <typename C, typename P, typename G, Rounding kRounding>
void UpdateAs(const Slice& slice) {
  Pass<C, P, G> pass(slice);
  if (slice.squares == nullptr) {
    pass.Run(Choose<C, P, G, kRounding, false>(slice), 0, slice.size, nullptr);
    return;
  }
  const Loop loop = Choose<C, P, G, kRounding, true>(slice);
  Squares* squares = slice.squares;
  for (int64_t start = 0, n; start < slice.size; start += n) {
    n = LeftOfBlock(slice, start);
    Lanes<C> sums = {};
    pass.Run(loop, start, start + n, &sums);
    *squares++ = SquaresOf<C>(slice, start, n, sums);
  }
}

template <Rounding kRounding>
void UpdateNarrow(const Slice& slice) {
  if (slice.dtype[kGrads] == DType::kBF16) {
    UpdateAs<float, BF16, BF16, kRounding>(slice);
  } else {
    UpdateAs<float, BF16, float, kRounding>(slice);
  }
}

inline void Update(const Slice& slice) {
  const bool wide = slice.dtype[kParams] == DType::kF64;
  if (slice.kept) {
    wide ? SumKept<double>(slice) : SumKept<float>(slice);
  } else if (wide) {
    UpdateAs<double, double, double, Rounding::kNearest>(slice);
  } else if (slice.dtype[kParams] != DType::kBF16) {
    UpdateAs<float, float, float, Rounding::kNearest>(slice);
  } else if (slice.in[kRemainder] != nullptr) {
    UpdateNarrow<Rounding::kSplit>(slice);
  } else if (slice.stochastic) {
    UpdateNarrow<Rounding::kStochastic>(slice);
  } else {
    UpdateNarrow<Rounding::kNearest>(slice);
  }
}

}  // namespace adamw::ADAMW_ISA

#endif  // ADAMW_XLA_ADAMW_H_

// One AdamW step over a slice of a leaf: the arithmetic, for every dtype and option.
//
// contract.py has the equations. They are computed in float64 for float64 params and
// in float32 for all others. Operands of another dtype pass through a block of scratch
// that stays in the first-level cache, so the loop itself exists once per compute type,
// amsgrad and ema. Options that cost nothing in it are data: no clipping is clipping at
// infinity, no leaf_scale a scale of one, no nesterov a step of zero along the gradient,
// all exact.
//
// Each instruction set compiles this header into a namespace of its own (ADAMW_ISA).
// It uses no function of the standard library, for the reason that slice.h gives.
// The build turns contraction to FMA off: an element then has the same bits in the body
// and in the tail of a vector loop, on any number of threads and any instruction set.

#ifndef ADAMW_XLA_ADAMW_H_
#define ADAMW_XLA_ADAMW_H_

#include <cstdint>

#include "slice.h"

#ifndef ADAMW_ISA
#define ADAMW_ISA baseline
#endif

// A result may alias what it replaces, element by element: no dependence between
// iterations, which the compiler cannot know.
#if defined(__clang__)
#define ADAMW_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define ADAMW_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace adamw::ADAMW_ISA {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;

// ---------------------------------------------------------------------------- dtypes

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Storage types of 16 bits; the others are float and double themselves.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float Widen(float x) { return x; }
inline double Widen(double x) { return x; }
inline float Widen(BF16 x) { return FloatOf(uint32_t{x.bits} << 16); }

// Subnormals are converted as integers: a subnormal float on the way would be flushed.
inline float Widen(F16 x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t shifted = magnitude << 13;
  const uint32_t normal = shifted + (112u << 23);
  const uint32_t special = shifted | 0x7f800000u;
  const uint32_t tiny = BitsOf(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? tiny : normal;
  return FloatOf(sign | (magnitude < 0x7c00u ? finite : special));
}

template <typename T, typename C>
inline T Narrow(C x) {
  return static_cast<T>(x);
}

// Round to nearest, ties to even; a NaN stays one.
template <>
inline BF16 Narrow<BF16>(float x) {
  const uint32_t bits = BitsOf(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BF16{static_cast<uint16_t>(is_nan ? quiet : rounded)};
}

template <>
inline F16 Narrow<F16>(float x) {
  const uint32_t bits = BitsOf(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // The unit in the last place of 0.5 is that of half's subnormals.
  const uint32_t tiny = BitsOf(FloatOf(magnitude) + 0.5f) - BitsOf(0.5f);
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? tiny : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return F16{static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
}

template <>
inline BF16 Narrow<BF16>(double x) {
  return Narrow<BF16>(static_cast<float>(x));
}

template <>
inline F16 Narrow<F16>(double x) {
  return Narrow<F16>(static_cast<float>(x));
}

template <typename C, typename T>
inline void LoadAs(const void* from, int64_t start, int64_t n, C* to) {
  const T* x = static_cast<const T*>(from) + start;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(Widen(x[i]));
}

template <typename C, typename T>
inline void StoreAs(const C* from, int64_t start, int64_t n, void* to) {
  T* x = static_cast<T*>(to) + start;
  ADAMW_VECTORIZE
  for (int64_t i = 0; i < n; ++i) x[i] = Narrow<T>(from[i]);
}

template <typename C>
void Load(DType dtype, const void* from, int64_t start, int64_t n, C* to) {
  switch (dtype) {
    case DType::kBF16: return LoadAs<C, BF16>(from, start, n, to);
    case DType::kF16: return LoadAs<C, F16>(from, start, n, to);
    case DType::kF32: return LoadAs<C, float>(from, start, n, to);
    case DType::kF64: return LoadAs<C, double>(from, start, n, to);
  }
}

template <typename C>
void Store(DType dtype, const C* from, int64_t start, int64_t n, void* to) {
  switch (dtype) {
    case DType::kBF16: return StoreAs<C, BF16>(from, start, n, to);
    case DType::kF16: return StoreAs<C, F16>(from, start, n, to);
    case DType::kF32: return StoreAs<C, float>(from, start, n, to);
    case DType::kF64: return StoreAs<C, double>(from, start, n, to);
  }
}

// ------------------------------------------------------------------------ arithmetic

// StableHLO's maximum and minimum: a NaN on either side is the result. As two selects,
// of which the first is one instruction; GCC does not vectorize the "or" of conditions.
template <typename C>
inline C Max(C a, C b) {
  const C larger = a > b ? a : b;
  return a != a ? a : larger;
}

template <typename C>
inline C Min(C a, C b) {
  const C smaller = a < b ? a : b;
  return a != a ? a : smaller;
}

inline float Sqrt(float x) { return __builtin_sqrtf(x); }
inline double Sqrt(double x) { return __builtin_sqrt(x); }

template <typename C, bool kAmsgrad, bool kWithEma>
void UpdateLoop(const Slice& slice, int64_t n, const C* const in[], C* const out[]) {
  const auto slot = [&slice](Slot which) { return static_cast<C>(slice.slots[which]); };
  const C grad_scale = slot(GRAD_SCALE), leaf_scale = static_cast<C>(slice.leaf_scale);
  const C high = slot(CLIP_VALUE), low = -high;
  const C beta_1 = slot(BETA_1), one_minus_beta_1 = slot(ONE_MINUS_BETA_1);
  const C beta_2 = slot(BETA_2), one_minus_beta_2 = slot(ONE_MINUS_BETA_2);
  const C step_size = slot(STEP_SIZE), decay_rate = slot(DECAY_RATE);
  const C v_correction = slot(V_CORRECTION), epsilon = slot(EPSILON);
  const C epsilon_root = slot(EPSILON_ROOT), grad_step_size = slot(GRAD_STEP_SIZE);
  const C momentum = slot(EMA_MOMENTUM), one_minus_momentum = slot(ONE_MINUS_EMA_MOMENTUM);
  const bool overwrite = slot(EMA_OVERWRITE) != 0;

  const C *const p_in = in[kParams], *const g_in = in[kGrads];
  const C *const m_in = in[kM], *const v_in = in[kV];
  const C *const v_max_in = in[kVMax], *const ema_in = in[kEma];
  C *const p_out = out[kParams], *const m_out = out[kM], *const v_out = out[kV];
  C *const v_max_out = out[kVMax], *const ema_out = out[kEma];

  ADAMW_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    C g = grad_scale * g_in[i] * leaf_scale;
    g = Min(Max(g, low), high);
    const C m = beta_1 * m_in[i] + one_minus_beta_1 * g;
    const C v = beta_2 * v_in[i] + one_minus_beta_2 * (g * g);
    C w = v;
    if constexpr (kAmsgrad) v_max_out[i] = w = Max(v, v_max_in[i]);
    const C root = Sqrt(w + epsilon_root) * v_correction;
    const C step = (step_size * m + grad_step_size * g) / (root + epsilon);
    C p = p_in[i] - (decay_rate * p_in[i] + step);
    if constexpr (kWithEma) {
      const C ema = momentum * ema_in[i] + one_minus_momentum * p;
      ema_out[i] = ema;
      p = overwrite ? ema : p;
    }
    p_out[i] = p;
    m_out[i] = m;
    v_out[i] = v;
  }
}

template <typename C>
void UpdateAs(const Slice& slice, DType compute) {
  constexpr int64_t kBlock = 256;
  alignas(64) C scratch[kNumKinds][kBlock];
  bool direct = true;
  for (int k = 0; k < kNumKinds; ++k) {
    direct &= slice.in[k] == nullptr || slice.dtype[k] == compute;
  }
  const bool amsgrad = slice.in[kVMax] != nullptr, ema = slice.in[kEma] != nullptr;
  const auto loop = amsgrad ? (ema ? UpdateLoop<C, true, true> : UpdateLoop<C, true, false>)
                            : (ema ? UpdateLoop<C, false, true> : UpdateLoop<C, false, false>);
  const int64_t block = direct ? slice.size : kBlock;
  for (int64_t start = 0; start < slice.size; start += block) {
    const int64_t n = slice.size - start < block ? slice.size - start : block;
    const C* in[kNumKinds] = {};
    C* out[kNumKinds] = {};
    for (int k = 0; k < kNumKinds; ++k) {
      if (slice.in[k] == nullptr) continue;
      if (slice.dtype[k] == compute) {
        in[k] = static_cast<const C*>(slice.in[k]) + start;
        if (slice.out[k] != nullptr) out[k] = static_cast<C*>(slice.out[k]) + start;
      } else {
        Load(slice.dtype[k], slice.in[k], start, n, scratch[k]);
        in[k] = out[k] = scratch[k];
      }
    }
    loop(slice, n, in, out);
    for (int k = 0; k < kNumKinds; ++k) {
      if (slice.out[k] == nullptr || slice.dtype[k] == compute) continue;
      Store(slice.dtype[k], scratch[k], start, n, slice.out[k]);
    }
  }
}

inline void Update(const Slice& slice) {
  if (slice.dtype[kParams] == DType::kF64) {
    UpdateAs<double>(slice, DType::kF64);
  } else {
    UpdateAs<float>(slice, DType::kF32);
  }
}

}  // namespace adamw::ADAMW_ISA

#endif  // ADAMW_XLA_ADAMW_H_

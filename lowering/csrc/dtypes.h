// Numbers as they are stored: conversions of one, and of a block of them.
//
// A part of adamw.h, which says how it is compiled.

#ifndef ADAMW_XLA_DTYPES_H_
#define ADAMW_XLA_DTYPES_H_

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

using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;

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

constexpr uint32_t kHigh = 0xffff0000u;

inline BF16 UpperHalf(uint32_t bits) { return BF16{static_cast<uint16_t>(bits >> 16)}; }

// To nearest, ties to even, in the upper half; a NaN stays one.
inline uint32_t RoundToBF16(float x) {
  const uint32_t bits = BitsOf(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? bits | 0x400000u : rounded;
}

template <typename T, typename C>
inline T Narrow(C x) {
  return static_cast<T>(x);
}

template <>
inline BF16 Narrow<BF16>(float x) {
  return UpperHalf(RoundToBF16(x));
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

constexpr int64_t BytesOf(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
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
    case DType::kI16: return;  // no number to compute with
  }
}

template <typename C>
void Store(DType dtype, const C* from, int64_t start, int64_t n, void* to) {
  switch (dtype) {
    case DType::kBF16: return StoreAs<C, BF16>(from, start, n, to);
    case DType::kF16: return StoreAs<C, F16>(from, start, n, to);
    case DType::kF32: return StoreAs<C, float>(from, start, n, to);
    case DType::kF64: return StoreAs<C, double>(from, start, n, to);
    case DType::kI16: return;
  }
}

}  // namespace adamw::ADAMW_ISA

#endif  // ADAMW_XLA_DTYPES_H_

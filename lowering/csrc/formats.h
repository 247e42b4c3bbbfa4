// What is stored otherwise than it is computed with: m and v in one word, and bfloat16
// params rounded at random or with a remainder.
//
// formats/word.py and formats/narrow.py say what each line is for; the bits are theirs.
// A part of adamw.h, which says how it is compiled.

#ifndef ADAMW_XLA_FORMATS_H_
#define ADAMW_XLA_FORMATS_H_

#include "dtypes.h"

namespace adamw::ADAMW_ISA {

constexpr uint32_t kSign = 0x80000000u, kHigh = 0xffff0000u;
constexpr int32_t kInfinity = 0x7f800000;

inline int32_t SizeOf(uint32_t bits) { return static_cast<int32_t>(bits & ~kSign); }

template <typename T>
inline T Least(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
inline T Most(T a, T b) {
  return a > b ? a : b;
}

// ----------------------------------------------------------------------------- words

constexpr int kMantissa = 21;                // bits of a float's mantissa that a code drops
constexpr uint32_t kOctave = 4u << kMantissa;  // codes of one exponent

// A float of 2 bits of mantissa with gradual underflow: x's code is that of x + max(x, 2^least),
// a normal float's highest bits, with no case for the linear range.
template <int kLeastExponent, int kLargest>
struct Codes {
  static constexpr uint32_t kZero = static_cast<uint32_t>(127 + kLeastExponent) << 23;
  static constexpr uint32_t kEnd = kZero + ((kLargest + 1u) << kMantissa) - 1;

  // Of a code, shifted by kMantissa and with kZero added.
  static float Decode(uint32_t bits) {
    return FloatOf(Least(BitsOf(FloatOf(bits) - FloatOf(kZero)), bits - kOctave));
  }

  // The same, and below it what is rounded off; the noise, of kMantissa bits, carries.
  static uint32_t Encode(float x, uint32_t noise) {
    return Least(BitsOf(x + FloatOf(Most(BitsOf(x), kZero))) + noise, kEnd);
  }
};

using VCodes = Codes<-98, 507>;
using UCodes = Codes<-10, 63>;

constexpr uint32_t kFirst = 2;  // v's code where v is 0, in a word

// The pattern of the power of two that m is a multiple of, from v's code.
inline uint32_t Unit(uint32_t bits) {
  return (Most(bits, VCodes::kZero + kOctave) + (126u << 23)) >> 1 & 0x7f800000u;
}

struct Moments {
  float m, v;
};

inline Moments Decode(uint16_t stored) {
  const uint32_t word = stored;
  const uint32_t c = Most(word << 15 & 0x1ffu << kMantissa, kFirst << kMantissa);
  const uint32_t code = c + (VCodes::kZero - (kFirst << kMantissa));
  const float u = UCodes::Decode((word << kMantissa & 0x3fu << kMantissa) + UCodes::kZero);
  const float unit = FloatOf(Unit(code) | (word << 16 & kSign));
  return {u * unit, VCodes::Decode(code)};
}

inline uint16_t Encode(Moments x, uint32_t random) {
  const uint32_t code = VCodes::Encode(x.v, random & ((1u << kMantissa) - 1));
  const float inverse = FloatOf((254u << 23) - Unit(code));
  const uint32_t bits = BitsOf(x.m);
  const float u = FloatOf(bits & ~kSign) * inverse;
  const uint32_t a = UCodes::Encode(u, random >> (32 - kMantissa));
  // In the upper half, so that nothing is narrowed before it is all there.
  constexpr uint32_t kOffset = (kFirst << 22) - (VCodes::kZero << 1) - (UCodes::kZero >> 5);
  const uint32_t word = ((code & ~((1u << kMantissa) - 1)) << 1) + (a >> 5) + kOffset;
  return static_cast<uint16_t>((word | (bits & kSign)) >> 16);
}

// 32 bits for one element; `salt` is the part of the sum that all elements share.
inline uint32_t SaltOf(float step) { return BitsOf(step) * 0x85ebca6bu; }

inline uint32_t RandomBits(float grad, float param, uint32_t salt) {
  uint32_t x = BitsOf(grad) * 0x9e3779b9u + BitsOf(param) + salt;
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// ---------------------------------------------------------------------- narrow params

// One of the two numbers beside x; what is finite stays finite, and infinities and NaN, which
// arithmetic makes quiet, stay.
inline BF16 RoundAtRandom(float x, uint32_t random) {
  const uint32_t bits = BitsOf(x), size = bits & ~kSign;
  const uint32_t up = size + (random * 0x2c1b3c6du >> 16);
  const uint32_t rounded = Least(up, Most(size, 0x7f7fffffu));
  return BF16{static_cast<uint16_t>((rounded | (bits & kSign)) >> 16)};
}

// The master of a param and its remainder.
inline float Join(BF16 param, int16_t remainder) {
  const uint32_t bits = uint32_t{param.bits} << 16;
  const int32_t size = SizeOf(bits);
  int32_t low = remainder;
  low = size > 0 ? low : Most(low, int32_t{0});
  low = size < kInfinity ? low : Least(low, int32_t{0});
  return FloatOf(size > kInfinity ? bits : bits + static_cast<uint32_t>(low));
}

// The nearest number, ties away from 0, and what is left: two functions, since GCC would
// make one word of a struct of both, and no vectors.
inline uint32_t Unsplit(float master) {
  const uint32_t bits = BitsOf(master);
  return SizeOf(bits) < 0x00800000 ? bits & kSign : bits;
}

inline uint32_t HighOf(uint32_t bits) { return (bits + 0x8000u) & kHigh; }

inline BF16 ParamOf(float master) {
  const uint32_t bits = Unsplit(master);
  const uint32_t high = SizeOf(bits) > kInfinity ? bits | 0x400000u : HighOf(bits);
  return BF16{static_cast<uint16_t>(high >> 16)};
}

inline int16_t RemainderOf(float master) {
  const uint32_t bits = Unsplit(master);
  const uint32_t low = SizeOf(bits) > kInfinity ? 0u : bits - HighOf(bits);
  return static_cast<int16_t>(low);
}

}  // namespace adamw::ADAMW_ISA

#endif  // ADAMW_XLA_FORMATS_H_

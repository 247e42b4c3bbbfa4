// What is stored otherwise than it is computed with: m and v in one word, and bfloat16
// params rounded at random or with a remainder.
//
// formats/word.py and formats/narrow.py say what each line is for; the bits are theirs.
// A part of adamw.h, which says how it is compiled.

#ifndef ADAMW_XLA_FORMATS_H_
#define ADAMW_XLA_FORMATS_H_

#include "dtypes.h"

namespace adamw::ADAMW_ISA {

constexpr uint32_t kSign = 0x80000000u;
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

// a - b/2, where that is exact: fused or not, the same.
inline float LessHalf(float a, float b) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(b, -0.5f, a);
#else
  return a - b * 0.5f;
#endif
}

// ----------------------------------------------------------------------------- words

constexpr int kVDrops = 21, kUDrops = 20;  // bits of a float's mantissa that codes drop
constexpr int kScale = 4;                  // m's unit is as many octaves more here, see kUZero
constexpr uint32_t kFirst = 2u << kVDrops;              // v's code where v is 0, in a word
constexpr uint32_t kVZero = (127u - 98) << 23;          // the least v that is not linear
constexpr uint32_t kUZero = (127u - 3 - kScale) << 23;  // no bit of it is one of m's code's

// A constant that the compiler does not know. What it knows, GCC makes anew from a general
// register in each round of a loop with more of them than registers: 6 % of its time.
inline uint32_t Opaque(uint32_t x) {
  asm("" : "+r"(x));
  return x;
}

// A float of few bits of mantissa with gradual underflow: x's code is that of x + max(x, 2^least),
// a normal float's highest bits, with no case for the linear range.
struct Codes {
  uint32_t zero, normal, end;

  Codes(uint32_t least, uint32_t largest, int drops)
      : zero(Opaque(least)),
        normal(Opaque(least + (1u << 23))),
        end(Opaque(least + (largest << drops))) {}

  // Of a code, shifted by as many bits as it drops and with `zero` added.
  float Decode(uint32_t bits) const {
    return LessHalf(FloatOf(bits), FloatOf(Most(bits, normal)));
  }

  // The same, and below it what is rounded off; the noise, of the bits that it drops, carries.
  // A NaN is as much as the largest, before its pattern could overflow.
  uint32_t Encode(float x, uint32_t noise) const {
    return Least(BitsOf(x + FloatOf(Most(BitsOf(x), zero))), end) + noise;
  }
};

struct Moments {
  float m, v;
};

class Words {
 public:
  Moments Decode(uint16_t stored) const {
    const uint32_t word = stored;
    const uint32_t code = Most(word << 15 & v_field_, first_) + offset_;
    // m's unit is a power of two of half the exponent of v.
    const uint32_t unit = (Most(code, v_.normal) + unit_) >> 1 & exponent_;
    const float u = u_.Decode((word << kUDrops & u_field_) | u_.zero);
    return {u * FloatOf(unit | (word << 16 & sign_)), v_.Decode(code)};
  }

  uint16_t Encode(Moments x, uint32_t random) const {
    const uint32_t code = v_.Encode(x.v, random & noise_);
    const uint32_t inverse = (inverse_ - Most(code, v_.normal)) >> 1 & exponent_;
    const uint32_t bits = BitsOf(x.m);
    const float u = FloatOf(bits & ~sign_) * FloatOf(inverse);
    const uint32_t a = u_.Encode(u, random >> (32 - kUDrops)) >> (kUDrops - 16);
    // In the upper half, so that nothing is narrowed before it is all there.
    const uint32_t c = (code - offset_) << 1;
    const uint32_t size = (c & upper_) | (a & ~upper_);
    return static_cast<uint16_t>(((size & ~sign_) | (bits & sign_)) >> 16);
  }

  // 32 bits for one element; `salt` is the part of the sum that all elements share.
  uint32_t RandomBits(float grad, float param, uint32_t salt) const {
    uint32_t x = BitsOf(grad) * factors_[0] + BitsOf(param) + salt;
    x = (x ^ x >> 16) * factors_[1];
    x = (x ^ x >> 15) * factors_[2];
    return x ^ x >> 16;
  }

 private:
  const Codes v_{kVZero, 507, kVDrops}, u_{kUZero, 63, kUDrops};
  const uint32_t sign_ = Opaque(kSign), exponent_ = Opaque(0x7f800000u);
  const uint32_t v_field_ = Opaque(0x1ffu << kVDrops), u_field_ = Opaque(0x3fu << kUDrops);
  const uint32_t first_ = Opaque(kFirst), offset_ = Opaque(kVZero - kFirst);
  const uint32_t unit_ = Opaque((126u + 2 * kScale) << 23);
  const uint32_t inverse_ = Opaque(((510u - 2 * kScale - 126u) << 23) - 1);
  const uint32_t noise_ = Opaque((1u << kVDrops) - 1);
  const uint32_t upper_ = Opaque(0xffc00000u);
  const uint32_t factors_[3] = {Opaque(0x9e3779b9u), Opaque(0x7feb352du), Opaque(0x846ca68bu)};
};

inline uint32_t SaltOf(float step) { return BitsOf(step) * 0x85ebca6bu; }

// ---------------------------------------------------------------------- narrow params

// One of the two numbers beside x, in the upper half; what is finite stays finite, and infinities
// and NaN, which arithmetic makes quiet, stay.
inline uint32_t RoundAtRandom(float x, uint32_t random) {
  const uint32_t bits = BitsOf(x), size = bits & ~kSign;
  const uint32_t up = size + (random * 0x2c1b3c6du >> 16);
  const uint32_t rounded = Least(up, Most(size, 0x7f7fffffu));
  return rounded | (bits & kSign);
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

// The nearest number, ties away from 0, in the upper half, and what is left: two functions, since
// GCC would make one word of a struct of both, and no vectors.
inline uint32_t Unsplit(float master) {
  const uint32_t bits = BitsOf(master);
  return SizeOf(bits) < 0x00800000 ? bits & kSign : bits;
}

inline uint32_t HighOf(uint32_t bits) { return (bits + 0x8000u) & kHigh; }

inline uint32_t ParamOf(float master) {
  const uint32_t bits = Unsplit(master);
  return SizeOf(bits) > kInfinity ? bits | 0x400000u : HighOf(bits);
}

inline int16_t RemainderOf(float master) {
  const uint32_t bits = Unsplit(master);
  const uint32_t low = SizeOf(bits) > kInfinity ? 0u : bits - HighOf(bits);
  return static_cast<int16_t>(low);
}

}  // namespace adamw::ADAMW_ISA

#endif  // ADAMW_XLA_FORMATS_H_

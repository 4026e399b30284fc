// Vectors of the machine's width, and the functions of them that the cells need.
//
// GCC's and Clang's vector extensions: the compiler turns them into AVX-512, AVX2, SSE or NEON, whatever the machine
// has. float is fast; double, which only the tests of exactness use, calls the C library.
// Activations may be stored as bfloat16 and are widened to float when they are read.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moxe {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

struct BFloat16 {
  uint16_t bits;
};

// What a stored number is computed in.
template <class S>
struct ComputeTypeOf {
  using type = S;
};
template <>
struct ComputeTypeOf<BFloat16> {
  using type = float;
};
template <class S>
using ComputeType = typename ComputeTypeOf<S>::type;

using Ints = Vector<int32_t>;
using HalfWords = VectorOf<uint16_t, kVectorBytes / 2>::type;

inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// Rounds to nearest, ties to even; NaN stays NaN.
template <class S>
inline S narrow(ComputeType<S> x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return BFloat16{0x7fc0};
    return BFloat16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    return x;
  }
}

// GCC takes five instructions for what the processor does in two (widen) or one (narrow); so these are named.
inline Vector<float> widen(HalfWords halves) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)halves), 16);
#else
  return (Vector<float>)(__builtin_convertvector(halves, Vector<uint32_t>) << 16);
#endif
}

inline HalfWords narrow(Vector<float> x) {
#if defined(__AVX512BF16__)
  return (HalfWords)_mm512_cvtneps_pbh((__m512)x);
#else
  const auto bits = (Vector<uint32_t>)x;
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vector<uint32_t> quiet = Vector<uint32_t>{} + 0x7fc0u;
  const auto chosen = (Vector<uint32_t>)(x != x ? (Ints)quiet : (Ints)rounded);
#if defined(__AVX512F__)
  return (HalfWords)_mm512_cvtepi32_epi16((__m512i)chosen);
#else
  return __builtin_convertvector(chosen, HalfWords);
#endif
#endif
}

template <class S>
inline Vector<ComputeType<S>> load(const S* from) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    HalfWords halves;
    std::memcpy(&halves, from, sizeof halves);
    return widen(halves);
  } else {
    Vector<S> x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
}

template <class S>
inline void store(S* to, Vector<ComputeType<S>> x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const HalfWords halves = narrow(x);
    std::memcpy(to, &halves, sizeof halves);
  } else {
    std::memcpy(to, &x, sizeof x);
  }
}

// Asks for a cache line that is read soon. An address behind the array does no harm.
template <class S>
inline void fetch(const S* from) {
  __builtin_prefetch(from, 0, 2);
}

template <class T>
inline Vector<T> fill(T x) {
  return Vector<T>{} + x;
}

// The halves are added until two lanes remain: a chain of log2(lanes) additions instead of one as long as the vector.
template <class T, int kBytes = kVectorBytes>
inline T sum(typename VectorOf<T, kBytes>::type x) {
  if constexpr (kBytes == 2 * sizeof(T)) {
    return x[0] + x[1];
  } else {
    typename VectorOf<T, kBytes / 2>::type halves[2];
    std::memcpy(halves, &x, sizeof x);
    return sum<T, kBytes / 2>(halves[0] + halves[1]);
  }
}
inline float sum(Vector<float> x) { return sum<float, kVectorBytes>(x); }
inline double sum(Vector<double> x) { return sum<double, kVectorBytes>(x); }

// How much of a vector a loop step covers: all lanes, or the first few where a row ends.
struct Whole {};
struct Part {
  int64_t lanes;
};

// Calls body(c, Whole{}) for c = 0, lanes, 2 lanes, ... and body(c, Part{rest}) where that does not reach `size`.
template <class T, class F>
inline void for_each_vector(int64_t size, const F& body) {
  int64_t c = 0;
  for (; c + kLanes<T> <= size; c += kLanes<T>) body(c, Whole{});
  if (c < size) body(c, Part{size - c});
}

// A part is read with zeros behind it.
template <class S>
inline Vector<ComputeType<S>> load(const S* from, Whole) {
  return load(from);
}
template <class S>
inline Vector<ComputeType<S>> load(const S* from, Part part) {
  S lanes[kLanes<ComputeType<S>>] = {};
  std::memcpy(lanes, from, part.lanes * sizeof(S));
  return load(lanes);
}

template <class S>
inline void store(S* to, Vector<ComputeType<S>> x, Whole) {
  store(to, x);
}
template <class S>
inline void store(S* to, Vector<ComputeType<S>> x, Part part) {
  S lanes[kLanes<ComputeType<S>>];
  store(lanes, x);
  std::memcpy(to, lanes, part.lanes * sizeof(S));
}

// x with zeros behind the part.
template <class V>
inline V cut(V x, Whole) {
  return x;
}
template <class V>
inline V cut(V x, Part part) {
  for (size_t lane = part.lanes; lane < sizeof x / sizeof x[0]; ++lane) x[lane] = 0;
  return x;
}

// A NaN in either stays, as in torch.maximum.
template <class V>
inline V maximum(V x, V y) {
  return (x > y) | (x != x) ? x : y;
}

template <class F>
inline Vector<double> by_lane(Vector<double> x, F function) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = function(x[lane]);
  return x;
}

inline Vector<double> exp(Vector<double> x) {
  return by_lane(x, [](double y) { return std::exp(y); });
}
inline Vector<double> tanh(Vector<double> x) {
  return by_lane(x, [](double y) { return std::tanh(y); });
}

// e^x within 2 units in the last place; 0 below -87.3 (where float has no normal number), infinity above 88.3.
inline Vector<float> exp(Vector<float> x) {
  using V = Vector<float>;
  const V lowest = fill(-87.3f), highest = fill(88.7f);
  V y = x < lowest ? lowest : x;
  y = y > highest ? highest : y;
  // x = n log 2 + r; adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
  const V shifter = fill(12582912.0f);
  const V shifted = y * 1.44269504088896341f + shifter;
  const V n = shifted - shifter;
  V r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const auto power = ((Ints)shifted - (Ints)shifter + 127) << 23;
  V result = p * (V)power;
  result = x < lowest ? V{} : result;
  return x > highest ? fill(std::numeric_limits<float>::infinity()) : result;
}

inline Vector<float> tanh(Vector<float> x) {
  using V = Vector<float>;
  const V magnitude = x < 0 ? -x : x;
  const V e = exp(magnitude * -2.0f);
  const V far = (1.0f - e) / (1.0f + e);
  // Near 0 the difference 1 - e loses digits: an odd polynomial in x instead.
  const V square = x * x;
  V p = fill(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const V near = x + x * square * p;
  return magnitude < 0.625f ? near : (x < 0 ? -far : far);
}

template <class V>
inline V sigmoid(V x) {
  return 1.0f / (1.0f + exp(-x));
}

template <class V>
inline V silu(V x) {
  return x * sigmoid(x);
}

// d silu / dx
template <class V>
inline V silu_slope(V x) {
  const V s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// SiLU and its slope from one exponential.
template <class V>
struct ValueAndSlope {
  V value, slope;
};
template <class V>
inline ValueAndSlope<V> silu_and_slope(V x) {
  const V s = sigmoid(x), value = x * s;
  return {value, s + value * (1.0f - s)};
}

template <class T>
  requires std::is_floating_point_v<T>
inline T log_sigmoid(T x) {
  return (x < 0 ? x : T(0)) - std::log1p(std::exp(-std::fabs(x)));
}

inline Vector<double> log_sigmoid(Vector<double> x) {
  return by_lane(x, [](double y) { return log_sigmoid(y); });
}

// log sigmoid x = min(x, 0) - log(1 + e^-|x|), the logarithm by its series in s = y / (2 + y) <= 1/3.
inline Vector<float> log_sigmoid(Vector<float> x) {
  using V = Vector<float>;
  const V y = exp(x < 0 ? x : -x);
  const V s = y / (y + 2.0f), square = s * s;
  V p = fill(1.0f / 15);
  for (float odd = 13; odd >= 1; odd -= 2) p = p * square + 1.0f / odd;
  return (x < 0 ? x : V{}) - 2.0f * s * p;
}

}  // namespace moxe

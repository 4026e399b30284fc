// Matrix products of a whole layer: operands are packed into panels that a near cache holds, then multiplied by tiles.
//
// Legend: M rows and N columns of a product, K terms of each of its sums.
//
// An element is one number, or two bfloat16 that belong to consecutive terms: the processor multiplies such pairs and
// adds both to a float in one instruction. A panel holds kPanel columns of B, element by element of k, with zeros where
// B ends. Every number of a product is one sum over k in order, or a sum of such sums over blocks of k.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"

namespace moxe {

struct Pair {
  uint32_t bits;
};

// What numbers stored as S are multiplied as, how many of them an element holds, and what their products add up in.
template <class S>
struct ElementOf {
  using type = S;
  static constexpr int64_t numbers = 1;
};
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
  static constexpr int64_t numbers = 2;
};
template <class S>
using Element = typename ElementOf<S>::type;
template <class S>
constexpr int64_t kNumbersOfElement = ElementOf<S>::numbers;

template <class T>
constexpr int64_t kPanel = kTileVectors * kLanes<T>;

template <class S>
int64_t elements_for(int64_t numbers) {
  return (numbers + kNumbersOfElement<S> - 1) / kNumbersOfElement<S>;
}

template <class T>
  requires std::is_floating_point_v<T>
inline void multiply_add(Vector<T>& total, T a, Vector<T> b) {
  total += a * b;
}
inline void multiply_add(Vector<float>& total, Pair a, Vector<uint32_t> b) {
#if defined(__AVX512BF16__)
  total = (Vector<float>)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(a.bits), (__m512bh)b);
#else
  const Vector<uint32_t> of_a = Vector<uint32_t>{} + a.bits, high = Vector<uint32_t>{} + 0xffff0000u;
  total += (Vector<float>)(of_a << 16) * (Vector<float>)(b << 16);
  total += (Vector<float>)(of_a & high) * (Vector<float>)(b & high);
#endif
}

inline Vector<uint32_t> load_elements(const Pair* from) {
  Vector<uint32_t> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class T>
  requires std::is_floating_point_v<T>
inline Vector<T> load_elements(const T* from) {
  return load(from);
}

// A vector of numbers in the upper halves of what they are multiplied as.
inline HalfWords load_halves(const float* from, auto lanes) { return narrow(load(from, lanes)); }
inline HalfWords load_halves(const BFloat16* from, Whole) {
  HalfWords halves;
  std::memcpy(&halves, from, sizeof halves);
  return halves;
}
inline HalfWords load_halves(const BFloat16* from, Part part) {
  HalfWords halves = {};
  std::memcpy(&halves, from, part.lanes * sizeof(BFloat16));
  return halves;
}

// Rows of X as elements of their consecutive numbers, kLanes of them.
template <class S, class X>
inline auto elements_of_row(const X* from) {
  if constexpr (kNumbersOfElement<S> == 1) {
    return load(from);
  } else {
    const HalfWords halves[2] = {load_halves(from, Whole{}), load_halves(from + kLanes<float>, Whole{})};
    Vector<uint32_t> pairs;
    std::memcpy(&pairs, halves, sizeof pairs);
    return pairs;
  }
}

template <class V, class E>
inline void store_elements(E* to, V x) {
  static_assert(sizeof(x[0]) == sizeof(E));
  std::memcpy(to, &x, sizeof x);
}

// to [K elements, width] = rows of X, K numbers of them, `ld` apart; with zeros behind the last row and the last column.
// The width is a whole number of vectors.
template <class S, class X, class T = ComputeType<S>>
void pack_rows(int64_t K, int64_t columns, const X* from, int64_t ld, int64_t width, Element<S>* to) {
  constexpr int64_t kNumbers = kNumbersOfElement<S>;
  const auto pack = [&](int64_t c, bool whole, auto lanes) {
    if constexpr (kNumbers == 1) {
      store_elements(to + c, load(from + c, lanes));
    } else {
      const HalfWords first = load_halves(from + c, lanes);
      const HalfWords second = whole ? load_halves(from + ld + c, lanes) : HalfWords{};
      store_elements(to + c, __builtin_convertvector(first, Vector<uint32_t>) |
                                 __builtin_convertvector(second, Vector<uint32_t>) << 16);
    }
  };
  for (int64_t k = 0; k < K; k += kNumbers, to += width, from += kNumbers * ld) {
    for_each_vector<T>(columns, [&](int64_t c, auto lanes) { pack(c, k + kNumbers <= K, lanes); });
    for (int64_t c = (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>; c < width; ++c) to[c] = {};
  }
}

// to [K elements, width] = columns of X: row c of `from` holds the K numbers of column c.
template <class S, class X, class T = ComputeType<S>>
void pack_columns(int64_t K, int64_t columns, const X* from, int64_t ld, int64_t width, Element<S>* to) {
  constexpr int64_t kNumbers = kNumbersOfElement<S>, kBlock = kLanes<T>;
  for (int64_t c0 = 0; c0 < width; c0 += kBlock)
    for (int64_t k0 = 0; k0 < K; k0 += kBlock * kNumbers) {
      Element<S> block[kBlock][kBlock] = {};
      const int64_t numbers = std::min(kBlock * kNumbers, K - k0);
      for (int64_t c = 0; c < std::min(kBlock, columns - c0); ++c) {
        const X* row = from + (c0 + c) * ld + k0;
        if (numbers == kBlock * kNumbers) {
          store_elements(block[c], elements_of_row<S>(row));
        } else {
          X padded[kBlock * kNumbers] = {};
          std::copy_n(row, numbers, padded);
          store_elements(block[c], elements_of_row<S>(padded));
        }
      }
      const int64_t elements = elements_for<S>(numbers);
      for (int64_t k = 0; k < elements; ++k)
        for (int64_t c = 0; c < kBlock; ++c) to[(k0 / kNumbers + k) * width + c0 + c] = block[c][k];
    }
}

// `columns` of kRows rows of C (+)= A B for one panel of B.
template <class T, bool kAdd, int kRows, class E, class C>
inline void panel_tile(int64_t K, const E* a, int64_t a_row, int64_t a_column, const E* panel, int64_t columns, C* c,
                       int64_t ldc) {
  Vector<T> total[kRows][kTileVectors] = {};
  for (int64_t k = 0; k < K; ++k) {
    decltype(load_elements(panel)) row[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) row[v] = load_elements(panel + k * kPanel<T> + v * kLanes<T>);
    for (int m = 0; m < kRows; ++m) {
      const E scale = a[m * a_row + k * a_column];
      for (int v = 0; v < kTileVectors; ++v) multiply_add(total[m][v], scale, row[v]);
    }
  }
  const auto put = [&](C* to, Vector<T> x, auto lanes) { store(to, kAdd ? load(to, lanes) + x : x, lanes); };
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t left = columns - v * kLanes<T>;
      C* to = c + m * ldc + v * kLanes<T>;
      if (left >= kLanes<T>) {
        put(to, total[m][v], Whole{});
      } else if (left > 0) {
        put(to, total[m][v], Part{left});
      }
    }
}

// M rows of C (+)= A B for one panel of B; A's strides are in elements.
template <class T, bool kAdd, class E, class C>
void panel_product(int64_t M, int64_t K, const E* a, int64_t a_row, int64_t a_column, const E* panel, int64_t columns,
                   C* c, int64_t ldc) {
  int64_t m = 0;
  for (; m + kTileRows <= M; m += kTileRows)
    panel_tile<T, kAdd, kTileRows>(K, a + m * a_row, a_row, a_column, panel, columns, c + m * ldc, ldc);
  a += m * a_row;
  c += m * ldc;
  static_assert(kTileRows == 6);
  switch (M - m) {
    case 1: return panel_tile<T, kAdd, 1>(K, a, a_row, a_column, panel, columns, c, ldc);
    case 2: return panel_tile<T, kAdd, 2>(K, a, a_row, a_column, panel, columns, c, ldc);
    case 3: return panel_tile<T, kAdd, 3>(K, a, a_row, a_column, panel, columns, c, ldc);
    case 4: return panel_tile<T, kAdd, 4>(K, a, a_row, a_column, panel, columns, c, ldc);
    case 5: return panel_tile<T, kAdd, 5>(K, a, a_row, a_column, panel, columns, c, ldc);
    default: return;
  }
}

}  // namespace moxe

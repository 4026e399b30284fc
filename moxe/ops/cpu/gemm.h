// Small matrix products inside one thread: C (+)= A B for operands that lie in a cache.
//
// C is [M, N] and B is [K, N], both with rows of consecutive numbers; A is [M, K] with any two strides, so a transposed
// A needs no copy. A block of kTileRows x kTileVectors vectors of C stays in registers while k runs; every number of C is
// one sum over k in order, whatever the other rows are. What is added to is added last: long sums are sums of sums.
// B may be stored narrower than what is computed.
#pragma once

#include "cpu/vector.h"

namespace moxe {

constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

template <class T, bool kAdd, int kRows, int kVectors, class W = T>
inline void gemm_tile(int64_t K, const T* a, int64_t a_row, int64_t a_column, const W* b, int64_t ldb, T* c,
                      int64_t ldc) {
  Vector<T> total[kRows][kVectors];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v)
      total[m][v] = Vector<T>{};
  for (int64_t k = 0; k < K; ++k) {
    Vector<T> row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * ldb + v * kLanes<T>);
    for (int m = 0; m < kRows; ++m) {
      const T scale = a[m * a_row + k * a_column];
      for (int v = 0; v < kVectors; ++v) total[m][v] += scale * row[v];
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + m * ldc + v * kLanes<T>;
      store(to, kAdd ? load(to) + total[m][v] : total[m][v]);
    }
}

// Columns that do not fill a vector.
template <class T, bool kAdd, class W = T>
inline void gemm_edge(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_column, const W* b,
                      int64_t ldb, T* c, int64_t ldc) {
  for (int64_t m = 0; m < M; ++m) {
    T total[kLanes<T>];
    for (int64_t n = 0; n < N; ++n) total[n] = 0;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t n = 0; n < N; ++n) total[n] += a[m * a_row + k * a_column] * widen(b[k * ldb + n]);
    for (int64_t n = 0; n < N; ++n) c[m * ldc + n] = kAdd ? c[m * ldc + n] + total[n] : total[n];
  }
}

template <class T, bool kAdd, int kVectors, class W = T>
inline void gemm_columns(int64_t M, int64_t K, const T* a, int64_t a_row, int64_t a_column, const W* b, int64_t ldb,
                         T* c, int64_t ldc) {
  int64_t m = 0;
  for (; m + kTileRows <= M; m += kTileRows)
    gemm_tile<T, kAdd, kTileRows, kVectors>(K, a + m * a_row, a_row, a_column, b, ldb, c + m * ldc, ldc);
  a += m * a_row;
  c += m * ldc;
  static_assert(kTileRows == 6);
  switch (M - m) {
    case 1: return gemm_tile<T, kAdd, 1, kVectors>(K, a, a_row, a_column, b, ldb, c, ldc);
    case 2: return gemm_tile<T, kAdd, 2, kVectors>(K, a, a_row, a_column, b, ldb, c, ldc);
    case 3: return gemm_tile<T, kAdd, 3, kVectors>(K, a, a_row, a_column, b, ldb, c, ldc);
    case 4: return gemm_tile<T, kAdd, 4, kVectors>(K, a, a_row, a_column, b, ldb, c, ldc);
    case 5: return gemm_tile<T, kAdd, 5, kVectors>(K, a, a_row, a_column, b, ldb, c, ldc);
    default: return;
  }
}

// C = A B, or C += A B when kAdd. a_row and a_column are the strides of A.
template <class T, bool kAdd, class W = T>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_column, const W* b, int64_t ldb, T* c,
          int64_t ldc) {
  constexpr int kLane = kLanes<T>;
  int64_t n = 0;
  for (; n + kTileVectors * kLane <= N; n += kTileVectors * kLane)
    gemm_columns<T, kAdd, kTileVectors>(M, K, a, a_row, a_column, b + n, ldb, c + n, ldc);
  for (; n + kLane <= N; n += kLane) gemm_columns<T, kAdd, 1>(M, K, a, a_row, a_column, b + n, ldb, c + n, ldc);
  if (n < N) gemm_edge<T, kAdd>(M, N - n, K, a, a_row, a_column, b + n, ldb, c + n, ldc);
}

// to [columns, rows] = from [rows, columns], both with rows of consecutive numbers.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t ld_from, T* to, int64_t ld_to) {
  constexpr int64_t kBlock = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock)
    for (int64_t c0 = 0; c0 < columns; c0 += kBlock)
      for (int64_t c = c0; c < columns && c < c0 + kBlock; ++c)
        for (int64_t r = r0; r < rows && r < r0 + kBlock; ++r) to[c * ld_to + r] = from[r * ld_from + c];
}

}  // namespace moxe

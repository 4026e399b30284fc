// Normalisation of one head of a row: y = (x - mean) / sqrt(variance + eps), and its gradient.
#pragma once

#include "cpu/vector.h"

namespace moxe {

template <class T>
struct Statistics {
  T mean, rstd;
};

// The distances are squared in a second pass over the same cache lines: sum x^2 - mean^2 would lose every digit of a
// row that lies far from 0.
template <class S, class T = ComputeType<S>>
inline Statistics<T> statistics(const S* x, int64_t size, T eps) {
  Vector<T> total{}, squares{};
  for_each_vector<T>(size, [&](int64_t c, auto part) { total += load(x + c, part); });
  const T mean = sum(total) / size;
  for_each_vector<T>(size, [&](int64_t c, auto part) {
    const Vector<T> distance = cut(load(x + c, part) - mean, part);
    squares += distance * distance;
  });
  return {mean, 1 / std::sqrt(sum(squares) / size + eps)};
}

// dx = rstd (dy - mean(dy) - y mean(dy y)) for the gradient dy of y; the sums are those of dy and of dy y.
template <class S, class T = ComputeType<S>>
inline void statistics_gradient(const S* x, const T* dy, Statistics<T> of, T sum_dy, T sum_dy_y, int64_t size, S* dx) {
  const T mean_dy = sum_dy / size, mean_dy_y = sum_dy_y / size;
  for_each_vector<T>(size, [&](int64_t c, auto part) {
    const Vector<T> y = (load(x + c, part) - of.mean) * of.rstd;
    store(dx + c, of.rstd * (load(dy + c, part) - mean_dy - y * mean_dy_y), part);
  });
}

}  // namespace moxe

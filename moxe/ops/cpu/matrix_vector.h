// Products of a matrix and one vector, where reading the weights is all that takes time: each is read once, as it is
// stored.
//
// Legend: I inputs, O outputs.
#pragma once

#include "cpu/vector.h"

namespace moxe {

// How far ahead memory is asked for. The processor guesses too, but stops at every page: what no cache holds is read
// about twice as fast this way.
constexpr int64_t kBytesAhead = 8192;

// y[o] = <x, weight[o]> for kCount outputs that share a read of x; their weights begin `stride` numbers apart and may
// be stored narrower than x.
template <int kCount, class T, class W, class S>
inline void dot_products(int64_t inputs, const T* x, const W* weight, int64_t stride, S* y) {
  Vector<T> total[kCount] = {};
  for_each_vector<T>(inputs, [&](int64_t c, auto lanes) {
    const Vector<T> xs = load(x + c, lanes);
    for (int o = 0; o < kCount; ++o) {
      const W* const from = weight + o * stride + c;
      fetch(from + kBytesAhead / sizeof(W));
      total[o] += load(from, lanes) * xs;
    }
  });
  for (int o = 0; o < kCount; ++o) y[o] = narrow<S>(sum(total[o]));
}

// y [O] = W x for the first I columns of weight [O, stride].
template <class T, class W, class S>
void matrix_vector(int64_t outputs, int64_t inputs, const T* x, const W* weight, int64_t stride, S* y) {
  constexpr int kAtOnce = 4;
  int64_t o = 0;
  for (; o + kAtOnce <= outputs; o += kAtOnce)
    dot_products<kAtOnce>(inputs, x, weight + o * stride, stride, y + o);
  for (; o < outputs; ++o) dot_products<1>(inputs, x, weight + o * stride, stride, y + o);
}

}  // namespace moxe

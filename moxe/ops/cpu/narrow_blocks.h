// Block-diagonal products whose square blocks are no wider than a vector: a vector holds whole blocks of a row.
//
// Legend: N rows, E groups, C channels in blocks of kBlock.
//
//     y[n, b kBlock + o] = sum_j x[n, b kBlock + j] W[e, b, j, o]
//
// Term j of every output of a vector is one product: x with number j of each block in all places of that block, times
// the weights of input j. A few rows go through a vector's weights at a time; the rows are read and written once.
#pragma once

#include "cpu/tensor.h"

namespace moxe {

constexpr int kNarrowRows = 8;

// Numbers as wide as T.
template <class T>
using LaneIndex = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// The first lane of each lane's block. An array that is read: built lane by lane, it would be so each time.
template <int kBlock, class T>
struct FirstLanes {
  alignas(kVectorBytes) LaneIndex<T> lanes[kLanes<T>];

  constexpr FirstLanes() : lanes{} {
    for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = lane / kBlock * kBlock;
  }
};
template <int kBlock, class T>
constexpr FirstLanes<kBlock, T> kFirstLanes;

// Number j of each block in all places of that block.
template <int kBlock, class T>
inline Vector<T> spread(Vector<T> x, LaneIndex<T> j) {
  static_assert(kBlock <= kLanes<T>);
  Vector<LaneIndex<T>> from;
  std::memcpy(&from, kFirstLanes<kBlock, T>.lanes, sizeof from);
#if defined(__clang__)
  Vector<T> y;
  for (int lane = 0; lane < kLanes<T>; ++lane) y[lane] = x[from[lane] + j];
  return y;
#else
  return __builtin_shuffle(x, from + j);
#endif
}

// One group's weights [C / kBlock, kBlock, kBlock] as [vectors, kBlock, lanes]: input j's weights, output by output; or
// transposed, with the roles of inputs and outputs changed. Zeros behind the last channel.
template <int kBlock, class T>
void spread_weights(int64_t channels, const T* weight, bool transposed, T* to) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t vectors = (channels + kLane - 1) / kLane;
  std::fill_n(to, vectors * kBlock * kLane, T(0));
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < kBlock; ++j) {
      const int64_t block = c / kBlock, o = c % kBlock;
      to[(c / kLane * kBlock + j) * kLane + c % kLane] =
          weight[(block * kBlock + (transposed ? o : j)) * kBlock + (transposed ? j : o)];
    }
}

// The other way: puts what `add_outer` summed where the weights lie.
template <int kBlock, class T>
void gather_weights(int64_t channels, const T* spread, T* weight) {
  constexpr int64_t kLane = kLanes<T>;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < kBlock; ++j)
      weight[(c / kBlock * kBlock + j) * kBlock + c % kBlock] = spread[(c / kLane * kBlock + j) * kLane + c % kLane];
}

// Products of a few rows' channels in one vector with their spread weights.
template <int kBlock, int kRows, class T, class V>
inline void multiply(const T* weights, const V (&x)[kRows], V (&y)[kRows]) {
  for (int r = 0; r < kRows; ++r) y[r] = V{};
  for (int j = 0; j < kBlock; ++j) {
    const V of_input = load(weights + j * kLanes<T>);
    for (int r = 0; r < kRows; ++r) y[r] += spread<kBlock, T>(x[r], j) * of_input;
  }
}

// Adds what a few rows contribute to the gradient of those weights, laid out as the spread weights are.
template <int kBlock, int kRows, class T, class V>
inline void add_outer(const V (&x)[kRows], const V (&dy)[kRows], T* sums) {
  for (int j = 0; j < kBlock; ++j) {
    V of_input = load(sums + j * kLanes<T>);
    for (int r = 0; r < kRows; ++r) of_input += spread<kBlock, T>(x[r], j) * dy[r];
    store(sums + j * kLanes<T>, of_input);
  }
}

template <int kRows, class S, class V, class L>
inline void load_rows(const Rows<S>& x, int64_t n, int64_t c, L lanes, V (&to)[kRows]) {
  for (int r = 0; r < kRows; ++r) to[r] = load(x.at(n + r) + c, lanes);
}

template <class T>
int64_t spread_size(int64_t channels, int64_t block) {
  return (channels + kLanes<T> - 1) / kLanes<T> * kLanes<T> * block;
}

// Calls body(first row, integral_constant<number of rows>) for rows [begin, end), kNarrowRows at a time.
template <class F>
inline void for_few_rows(int64_t begin, int64_t end, const F& body) {
  for (; begin + kNarrowRows <= end; begin += kNarrowRows) body(begin, std::integral_constant<int, kNarrowRows>{});
  for (; begin < end; ++begin) body(begin, std::integral_constant<int, 1>{});
}

// Calls body(integral_constant<block>) for a block that fits into a vector of T; says whether there was one. These are the
// sizes in use (the paper's and that of the official xLSTM): every further one lengthens the compilation.
template <class T, class F>
bool by_narrow_block(int64_t block, const F& body) {
  const auto fits = [&](auto size) {
    if constexpr (size() <= kLanes<T>) {
      if (block == size()) {
        body(size);
        return true;
      }
    }
    return false;
  };
  return fits(std::integral_constant<int, 4>{}) || fits(std::integral_constant<int, 16>{});
}

// All groups' weights as `spread_weights` gives them.
template <int kBlock, class T>
Tensor spread_groups(int64_t channels, const Tensor& weight, bool transposed) {
  const int64_t groups = weight.size(0), size = spread_size<T>(channels, kBlock);
  const Tensor spread = at::empty({groups, size}, weight.options());
  for_each_task(groups, [&](int64_t e) {
    spread_weights<kBlock>(channels, data<T>(weight) + e * channels * kBlock, transposed, data<T>(spread) + e * size);
  });
  return spread;
}

}  // namespace moxe

// The gates of a few rows of the mLSTM, from their q, k and v.
//
// Legend: N rows, C channels, H heads; P = 2 H gates: the igate of each head, then the fgate of each head.
//
// There are far fewer gates than lanes times tiles, so vectors run along the channels, a few rows and gates at a time,
// and their lanes are added up at the end.
#pragma once

#include <array>

#include "cpu/tensor.h"

namespace moxe {

constexpr int kTileGates = 4, kTileRowsOfGates = 4;
constexpr int kSources = 3;

struct GateSizes {
  int64_t channels, heads;

  int64_t gates() const { return 2 * heads; }
  int64_t inputs() const { return kSources * channels; }
  int64_t weights() const { return gates() * inputs(); }
};

// q, k and v.
template <class S>
using Sources = std::array<Rows<S>, kSources>;

// igate and fgate, [N, H] each.
template <class T>
struct Gates {
  T* igate;
  T* fgate;

  T* at(int64_t n, int64_t gate, int64_t heads) const {
    return gate < heads ? igate + n * heads + gate : fgate + n * heads + gate - heads;
  }
};

template <class S, int kRows, int kGates, class L>
inline void add_products(const S* x, int64_t row, const ComputeType<S>* w, int64_t inputs, L lanes,
                         Vector<ComputeType<S>> (&total)[kRows][kGates]) {
  Vector<ComputeType<S>> of_gate[kGates];
  for (int p = 0; p < kGates; ++p) of_gate[p] = load(w + p * inputs, lanes);
  for (int r = 0; r < kRows; ++r) {
    const auto of_row = load(x + r * row, lanes);
    for (int p = 0; p < kGates; ++p) total[r][p] += of_row * of_gate[p];
  }
}

template <class S, int kRows, int kGates>
void gates_of_tile(const GateSizes& sizes, const Sources<const S>& sources, int64_t n, int64_t gate,
                   const ComputeType<S>* weight, const ComputeType<S>* bias, const Gates<ComputeType<S>>& out) {
  using T = ComputeType<S>;
  const int64_t inputs = sizes.inputs(), channels = sizes.channels;
  Vector<T> total[kRows][kGates] = {};
  for (int s = 0; s < kSources; ++s) {
    const int64_t row = sources[s].stride;
    const S* x = sources[s].at(n);
    const T* w = weight + gate * inputs + s * channels;
    // Not `for_each_vector`: behind its body, the compiler would keep the totals in memory.
    int64_t c = 0;
    for (; c + kLanes<T> <= channels; c += kLanes<T>)
      add_products<S, kRows, kGates>(x + c, row, w + c, inputs, Whole{}, total);
    if (c < channels) add_products<S, kRows, kGates>(x + c, row, w + c, inputs, Part{channels - c}, total);
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kGates; ++p) *out.at(n + r, gate + p, sizes.heads) = sum(total[r][p]) + bias[gate + p];
}

template <class S, int kRows>
void gates_of_rows(const GateSizes& sizes, const Sources<const S>& sources, int64_t n, const ComputeType<S>* weight,
                   const ComputeType<S>* bias, const Gates<ComputeType<S>>& out) {
  int64_t gate = 0;
  for (; gate + kTileGates <= sizes.gates(); gate += kTileGates)
    gates_of_tile<S, kRows, kTileGates>(sizes, sources, n, gate, weight, bias, out);
  for (; gate < sizes.gates(); ++gate) gates_of_tile<S, kRows, 1>(sizes, sources, n, gate, weight, bias, out);
}

}  // namespace moxe

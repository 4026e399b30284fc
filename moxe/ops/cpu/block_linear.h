// Block-diagonal products of packed rows, one weight set for each group of rows.
//
// Legend: N rows, E groups, Q blocks, I inputs and O outputs of a block.
//
//     y[n, q] = x[n, q] W[e, q] + bias[e, q]      dx[n, q] = dy[n, q] W[e, q]^T
//     dW[e, q] = sum_n x[n, q]^T dy[n, q]         dbias[e, q] = sum_n dy[n, q]
//
// A task takes a piece of a group's rows and a run of blocks whose weights fit the first-level cache, and walks over
// the rows a few at a time: so each row's blocks are read side by side, though their products are separate. A weight's
// gradient sums over rows: the first piece of a group writes it, the others write partial sums that are added in order.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace moxe {

struct BlockShape {
  int64_t blocks, inputs, outputs;

  int64_t weights() const { return inputs * outputs; }
};

// Blocks of numbers that lie side by side; rows and blocks may lie apart.
template <class S>
struct Blocks {
  S* start;
  int64_t row, block;

  S* at(int64_t n, int64_t q) const { return start + n * row + q * block; }
};

// Blocks [first, first + count) of a row.
struct Run {
  int64_t first, count;
};

// [E, Q, O] with the blocks `block` apart; absent if null.
template <class T>
struct BlockBias {
  T* start = nullptr;
  int64_t block = 0;

  T* at(const BlockShape& shape, int64_t e, int64_t q) const { return start + (e * shape.blocks + q) * block; }
};

constexpr int64_t kForwardRows = 96, kBackwardRows = 512;

inline std::vector<Run> runs_of_blocks(const BlockShape& shape) {
  constexpr int64_t kNumbers = 2048;
  const int64_t most = std::clamp<int64_t>(kNumbers / std::max<int64_t>(shape.weights(), 1), 1, shape.blocks);
  std::vector<Run> runs;
  for (int64_t q = 0; q < shape.blocks; q += most) runs.push_back({q, std::min(most, shape.blocks - q)});
  return runs;
}

// Rows taken at a time: what they read and write stays in the second-level cache.
inline int64_t rows_at_a_time(const BlockShape& shape, const Run& run) {
  constexpr int64_t kNumbers = 16384;
  const int64_t rows = kNumbers / std::max<int64_t>(run.count * (shape.inputs + shape.outputs), 1);
  return std::clamp<int64_t>(rows / kTileRows, 2, 16) * kTileRows;
}

// The rows from `begin` on of a run in the type they are computed in: where they lie, or as a copy in `scratch`.
template <class S, class T = ComputeType<S>>
Blocks<const T> widened(const Blocks<const S>& x, int64_t begin, int64_t rows, const Run& run, int64_t width,
                        T* scratch) {
  if constexpr (std::is_same_v<S, T>) {
    return {x.at(begin, run.first), x.row, x.block};
  } else {
    const Blocks<T> copy = {scratch, run.count * width, width};
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t q = 0; q < run.count; ++q)
        for_each_vector<T>(width, [&](int64_t c, auto lanes) {
          store(copy.at(n, q) + c, load(x.at(begin + n, run.first + q) + c, lanes), lanes);
        });
    return {scratch, copy.row, copy.block};
  }
}

// Where the rows from `begin` on of a run are computed: in place, or in `scratch`.
template <class S, class T = ComputeType<S>>
Blocks<T> computed_at(const Blocks<S>& y, int64_t begin, const Run& run, int64_t width, T* scratch) {
  if constexpr (std::is_same_v<S, T>) {
    return {y.at(begin, run.first), y.row, y.block};
  } else {
    return {scratch, run.count * width, width};
  }
}

// Stores what was computed in scratch.
template <class S, class T>
void narrowed(const Blocks<T>& computed, const Blocks<S>& y, int64_t begin, int64_t rows, const Run& run,
              int64_t width) {
  if constexpr (!std::is_same_v<S, T>) {
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t q = 0; q < run.count; ++q)
        for_each_vector<T>(width, [&](int64_t c, auto lanes) {
          store(y.at(begin + n, run.first + q) + c, load(computed.at(n, q) + c, lanes), lanes);
        });
  }
}

// y = x W + bias.
template <class X, class Y, class T = ComputeType<X>>
void block_linear(const BlockShape& shape, at::IntArrayRef row_offsets, const Blocks<const X>& x, const T* weight,
                  const BlockBias<const T>& bias, const Blocks<Y>& y) {
  const auto pieces = row_blocks(row_offsets, kForwardRows);
  const auto runs = runs_of_blocks(shape);
  for_each_task(pieces.size() * runs.size(), [&](int64_t task) {
    const RowBlock piece = pieces[task / runs.size()];
    const Run run = runs[task % runs.size()];
    const int64_t step = rows_at_a_time(shape, run);
    const int64_t most_x = step * run.count * shape.inputs, most_y = step * run.count * shape.outputs;
    Scratch scratch(Scratch::bytes_of<T>(most_x) + Scratch::bytes_of<T>(most_y));
    T* const x_copy = scratch.take<T>(most_x);
    T* const y_copy = scratch.take<T>(most_y);
    for (int64_t begin = piece.begin; begin < piece.end; begin += step) {
      const int64_t rows = std::min(step, piece.end - begin);
      const auto in = widened(x, begin, rows, run, shape.inputs, x_copy);
      const auto out = computed_at(y, begin, run, shape.outputs, y_copy);
      for (int64_t q = 0; q < run.count; ++q) {
        const int64_t block = piece.group * shape.blocks + run.first + q;
        const T* w = weight + block * shape.weights();
        if (bias.start) {
          const T* from = bias.at(shape, piece.group, run.first + q);
          for (int64_t n = 0; n < rows; ++n) std::copy_n(from, shape.outputs, out.at(n, q));
          gemm<T, true>(rows, shape.outputs, shape.inputs, in.at(0, q), in.row, 1, w, shape.outputs, out.at(0, q),
                        out.row);
        } else {
          gemm<T, false>(rows, shape.outputs, shape.inputs, in.at(0, q), in.row, 1, w, shape.outputs, out.at(0, q),
                         out.row);
        }
      }
      narrowed(out, y, begin, rows, run, shape.outputs);
    }
  });
}

// [E, Q, I, O] -> [E, Q, O, I]
template <class T>
Tensor transposed_blocks(const BlockShape& shape, const Tensor& weight) {
  Tensor transposed = at::empty({weight.size(0), shape.blocks, shape.outputs, shape.inputs}, weight.options());
  for_each_task(weight.size(0) * shape.blocks, [&](int64_t i) {
    transpose(shape.inputs, shape.outputs, data<T>(weight) + i * shape.weights(), shape.outputs,
              data<T>(transposed) + i * shape.weights(), shape.inputs);
  });
  return transposed;
}

// Partial sums of one piece of rows, [Q, I, O] and [Q, O].
template <class T>
struct BlockSums {
  T* weight;
  BlockBias<T> bias;
};

template <class T>
void add_rows(int64_t rows, int64_t width, const T* from, int64_t row, bool fresh, T* total) {
  for_each_vector<T>(width, [&](int64_t c, auto lanes) {
    Vector<T> sum = fresh ? Vector<T>{} : load(total + c, lanes);
    for (int64_t n = 0; n < rows; ++n) sum += load(from + n * row + c, lanes);
    store(total + c, sum, lanes);
  });
}

// What one task finds: dx of a run's blocks, and their part of the parameters' gradients; neither where it is null.
template <class X, class Y, class T>
void block_linear_backward_task(const BlockShape& shape, const RowBlock& piece, const Run& run,
                                const Blocks<const X>& x, const T* transposed, const Blocks<const Y>& dy,
                                const Blocks<X>& dx, const BlockSums<T>& sums) {
  const int64_t step = rows_at_a_time(shape, run);
  const int64_t most_x = step * run.count * shape.inputs, most_y = step * run.count * shape.outputs;
  Scratch scratch(2 * Scratch::bytes_of<T>(most_x) + Scratch::bytes_of<T>(most_y));
  T* const x_copy = scratch.take<T>(most_x);
  T* const dx_copy = scratch.take<T>(most_x);
  T* const dy_copy = scratch.take<T>(most_y);
  for (int64_t begin = piece.begin; begin < piece.end; begin += step) {
    const int64_t rows = std::min(step, piece.end - begin);
    const bool fresh = begin == piece.begin;
    const auto out = widened(dy, begin, rows, run, shape.outputs, dy_copy);
    if (sums.weight) {
      const auto in = widened(x, begin, rows, run, shape.inputs, x_copy);
      for (int64_t q = 0; q < run.count; ++q) {
        const auto product = fresh ? gemm<T, false> : gemm<T, true>;
        product(shape.inputs, shape.outputs, rows, in.at(0, q), 1, in.row, out.at(0, q), out.row,
                sums.weight + (run.first + q) * shape.weights(), shape.outputs);
        if (sums.bias.start)
          add_rows(rows, shape.outputs, out.at(0, q), out.row, fresh, sums.bias.at(shape, 0, run.first + q));
      }
    }
    if (dx.start) {
      const auto in = computed_at(dx, begin, run, shape.inputs, dx_copy);
      for (int64_t q = 0; q < run.count; ++q)
        gemm<T, false>(rows, shape.inputs, shape.outputs, out.at(0, q), out.row, 1,
                       transposed + (piece.group * shape.blocks + run.first + q) * shape.weights(), shape.inputs,
                       in.at(0, q), in.row);
      narrowed(in, dx, begin, rows, run, shape.inputs);
    }
  }
}

// dx (unless null), and dW and dbias (unless null). A group without rows gets zeros.
template <class X, class Y, class T = ComputeType<X>>
void block_linear_backward(const BlockShape& shape, at::IntArrayRef row_offsets, const Blocks<const X>& x,
                           const Tensor& weight, const Blocks<const Y>& dy, const Blocks<X>& dx, T* dweight,
                           const BlockBias<T>& dbias) {
  const auto pieces = row_blocks(row_offsets, kBackwardRows);
  const auto runs = runs_of_blocks(shape);
  const int64_t groups = weight.size(0), of_group = shape.blocks * shape.weights();
  const int64_t biases = dbias.start ? shape.blocks * shape.outputs : 0;
  const Tensor transposed = dx.start ? transposed_blocks<T>(shape, weight) : Tensor();
  const int64_t num_partial = dweight ? static_cast<int64_t>(pieces.size()) : 0;
  const Tensor partial = at::empty({num_partial, of_group + biases}, weight.options());

  const auto is_first = [&](const RowBlock& piece) { return piece.begin == row_offsets[piece.group]; };
  const auto sums_of = [&](int64_t i) -> BlockSums<T> {
    const int64_t e = pieces[i].group;
    if (!dweight) return {nullptr, {}};
    if (is_first(pieces[i]))
      return {dweight + e * of_group, {biases ? dbias.at(shape, e, 0) : nullptr, dbias.block}};
    T* const start = data<T>(partial) + i * (of_group + biases);
    return {start, {biases ? start + of_group : nullptr, shape.outputs}};
  };

  for_each_task(pieces.size() * runs.size(), [&](int64_t task) {
    const int64_t i = task / runs.size();
    block_linear_backward_task<X, Y, T>(shape, pieces[i], runs[task % runs.size()], x,
                                        dx.start ? data<T>(transposed) : nullptr, dy, dx, sums_of(i));
  });
  if (!dweight) return;
  for_each_task(groups * shape.blocks, [&](int64_t task) {
    const int64_t e = task / shape.blocks, q = task % shape.blocks;
    T* const to = dweight + task * shape.weights();
    if (row_offsets[e] == row_offsets[e + 1]) {
      std::fill_n(to, shape.weights(), T(0));
      if (biases) std::fill_n(dbias.at(shape, e, q), shape.outputs, T(0));
    }
    for (size_t i = 0; i < pieces.size(); ++i) {
      if (pieces[i].group != e || is_first(pieces[i])) continue;
      const BlockSums<T> part = sums_of(i);
      add_rows(1, shape.weights(), part.weight + q * shape.weights(), 0, false, to);
      if (biases) add_rows(1, shape.outputs, part.bias.at(shape, 0, q), 0, false, dbias.at(shape, e, q));
    }
  });
}

}  // namespace moxe

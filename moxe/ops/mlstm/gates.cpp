// The input and forget gates of the mLSTM: one skinny product of every row's q, k and v.
//
// Legend: N rows, E groups, C channels, H heads; P = 2 H gates: the igate of each head, then the fgate of each head.
//
//     [igate, fgate][n] = [q, k, v][n] W[e]^T + bias[e]        d[q, k, v][n] = dgates[n] W[e]
//     dW[e] = sum_n dgates[n]^T [q, k, v][n]                   dbias[e] = sum_n dgates[n]
//
// Each row is read once from memory. Backward, the channels are the columns of ordinary products, a few rows at a time
// that stay in the second-level cache.

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "mlstm/gates.h"

namespace moxe {
namespace {

constexpr int64_t kForwardRows = 64, kBackwardRows = 256, kRowsAtATime = 24;

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weight, const Tensor* bias) {
  for (const Tensor& x : {q, k, v}) {
    TORCH_CHECK(x.stride(1) == 1 || x.size(1) <= 1, "the channels of q, k and v must lie side by side");
    TORCH_CHECK(x.dtype() == q.dtype(), "q, k and v must be stored alike");
  }
  const auto parameters = core_options(q).dtype();
  TORCH_CHECK(weight.is_contiguous() && weight.dtype() == parameters, "weight must be contiguous, in ", parameters);
  if (bias)
    TORCH_CHECK(bias->is_contiguous() && bias->dtype() == parameters, "bias must be contiguous, in ", parameters);
}

std::tuple<Tensor, Tensor> mlstm_gates(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weight,
                                       const Tensor& bias, at::IntArrayRef row_offsets) {
  check(q, k, v, weight, &bias);
  const GateSizes sizes = {q.size(1), weight.size(1) / 2};
  Tensor igate = at::empty({q.size(0), sizes.heads}, weight.options());
  Tensor fgate = at::empty({q.size(0), sizes.heads}, weight.options());
  const auto pieces = row_blocks(row_offsets, kForwardRows);
  by_stored_type(q, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const Sources<const S> sources = {rows_of<const S>(q), rows_of<const S>(k), rows_of<const S>(v)};
    const Gates<T> out = {data<T>(igate), data<T>(fgate)};
    for_each_task(pieces.size(), [&](int64_t task) {
      const RowBlock piece = pieces[task];
      const T* w = data<T>(weight) + piece.group * sizes.weights();
      const T* b = data<T>(bias) + piece.group * sizes.gates();
      int64_t n = piece.begin;
      for (; n + kTileRowsOfGates <= piece.end; n += kTileRowsOfGates)
        gates_of_rows<S, kTileRowsOfGates>(sizes, sources, n, w, b, out);
      for (; n < piece.end; ++n) gates_of_rows<S, 1>(sizes, sources, n, w, b, out);
    });
  });
  return {igate, fgate};
}

// What a task adds up for its rows: [2 H, 3 C] and, behind it, [2 H].
template <class S>
void backward_of_piece(const GateSizes& sizes, const RowBlock& piece, const Gates<const ComputeType<S>>& dgates,
                       const Sources<const S>& sources, const ComputeType<S>* weight, const Sources<S>& dsources,
                       ComputeType<S>* sums) {
  using T = ComputeType<S>;
  const int64_t gates = sizes.gates(), channels = sizes.channels;
  const int64_t copied = std::is_same_v<S, T> ? 0 : kRowsAtATime * channels;
  Scratch scratch(Scratch::bytes_of<T>(kRowsAtATime * gates) + Scratch::bytes_of<T>(copied));
  T* const d = scratch.take<T>(kRowsAtATime * gates);
  T* const copy = scratch.take<T>(copied);
  std::fill_n(sums, sizes.weights() + gates, T(0));
  for (int64_t begin = piece.begin; begin < piece.end; begin += kRowsAtATime) {
    const int64_t rows = std::min(kRowsAtATime, piece.end - begin);
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t p = 0; p < gates; ++p) {
        d[n * gates + p] = *dgates.at(begin + n, p, sizes.heads);
        sums[sizes.weights() + p] += d[n * gates + p];
      }
    for (int s = 0; s < kSources; ++s) {
      const T* w = weight + s * channels;
      T* const dw = sums + s * channels;
      const S* x = sources[s].at(begin);
      S* dx = dsources[s].at(begin);
      if constexpr (std::is_same_v<S, T>) {
        gemm<T, true>(gates, channels, rows, d, 1, gates, x, sources[s].stride, dw, sizes.inputs());
        gemm<T, false>(rows, channels, gates, d, gates, 1, w, sizes.inputs(), dx, dsources[s].stride);
      } else {
        for (int64_t n = 0; n < rows; ++n)
          for_each_vector<T>(channels, [&](int64_t c, auto lanes) {
            store(copy + n * channels + c, load(x + n * sources[s].stride + c, lanes), lanes);
          });
        gemm<T, true>(gates, channels, rows, d, 1, gates, copy, channels, dw, sizes.inputs());
        gemm<T, false>(rows, channels, gates, d, gates, 1, w, sizes.inputs(), copy, channels);
        for (int64_t n = 0; n < rows; ++n)
          for_each_vector<T>(channels, [&](int64_t c, auto lanes) {
            store(dx + n * dsources[s].stride + c, load(copy + n * channels + c, lanes), lanes);
          });
      }
    }
  }
}

// Gradients of q, k, v, the weight and the bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_gates_backward(const Tensor& digate, const Tensor& dfgate,
                                                                        const Tensor& q, const Tensor& k,
                                                                        const Tensor& v, const Tensor& weight,
                                                                        at::IntArrayRef row_offsets) {
  check(q, k, v, weight, nullptr);
  for (const Tensor& d : {digate, dfgate})
    TORCH_CHECK(d.is_contiguous() && d.dtype() == weight.dtype(), "gates' gradients must be contiguous, as the weight");
  const GateSizes sizes = {q.size(1), weight.size(1) / 2};
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(q.sizes(), q.options());
  Tensor dv = at::empty(q.sizes(), q.options());
  Tensor dweight = at::zeros(weight.sizes(), weight.options());
  Tensor dbias = at::zeros({weight.size(0), sizes.gates()}, weight.options());
  const auto pieces = row_blocks(row_offsets, kBackwardRows);
  const int64_t of_piece = sizes.weights() + sizes.gates();
  const Tensor partial = at::empty({static_cast<int64_t>(pieces.size()), of_piece}, weight.options());
  by_stored_type(q, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const Sources<const S> sources = {rows_of<const S>(q), rows_of<const S>(k), rows_of<const S>(v)};
    const Sources<S> dsources = {rows_of<S>(dq), rows_of<S>(dk), rows_of<S>(dv)};
    const Gates<const T> dgates = {data<T>(digate), data<T>(dfgate)};
    for_each_task(pieces.size(), [&](int64_t i) {
      backward_of_piece<S>(sizes, pieces[i], dgates, sources, data<T>(weight) + pieces[i].group * sizes.weights(),
                           dsources, data<T>(partial) + i * of_piece);
    });
    // One task adds up one gate's row of every group, piece by piece.
    for_each_task(sizes.gates(), [&](int64_t p) {
      for (size_t i = 0; i < pieces.size(); ++i) {
        const int64_t e = pieces[i].group;
        const T* from = data<T>(partial) + i * of_piece;
        T* to = data<T>(dweight) + e * sizes.weights() + p * sizes.inputs();
        for (int64_t c = 0; c < sizes.inputs(); ++c) to[c] += from[p * sizes.inputs() + c];
        data<T>(dbias)[e * sizes.gates() + p] += from[sizes.weights() + p];
      }
    });
  });
  return {dq, dk, dv, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("mlstm_gates", &mlstm_gates);
  m.impl("mlstm_gates_backward", &mlstm_gates_backward);
}

}  // namespace moxe

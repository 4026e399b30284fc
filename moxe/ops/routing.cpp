// From the sorted rows of experts back to their tokens.
//
//     combine:  out_n = residual_n + sum_k w_nk y_r        r the sorted row of assignment k of token n
//     dy_r = w_nk dout_n;  dw_nk = dout_n . y_r
//
// Legend: N tokens, K experts a token, D hidden size; rows of y are N K, each belonging to one (token, expert).
//
// Loops run over tokens: a token's K rows lie far apart, but each is read, or written, whole and once. With weights of
// 1 `combine` is the backward pass of handing each token to its K experts.
#include "cpu/tensor.h"

namespace moxe {
namespace {

constexpr int64_t kTokens = 32;

void check(const Tensor& y, const OptionalTensor& weights, const Tensor& row_of_slot, int64_t N, int64_t K) {
  TORCH_CHECK(y.dim() == 2 && y.size(0) == N * K && row_of_slot.numel() == N * K && row_of_slot.is_contiguous() &&
                  row_of_slot.scalar_type() == at::kLong,
              "y must be [N K, D] and row_of_slot N K dense int64 numbers");
  TORCH_CHECK(!weights || (weights->sizes() == at::IntArrayRef({N, K}) && weights->is_contiguous() &&
                           weights->dtype() == core_options(y).dtype()),
              "weights must be dense [N, K], in ", core_options(y).dtype());
}

template <class S, class R, class T = ComputeType<S>>
void combine_token(const S* y, int64_t stride, const int64_t* rows, const T* weights, int64_t K, const R* residual,
                   int64_t D, R* out) {
  for_each_vector<T>(D, [&](int64_t c, auto part) {
    Vector<T> total = residual ? load(residual + c, part) : Vector<T>{};
    for (int64_t k = 0; k < K; ++k) {
      const Vector<T> row = load(y + rows[k] * stride + c, part);
      total += weights ? weights[k] * row : row;
    }
    store(out + c, total, part);
  });
}

// [N, D] in `dtype`, that of the residual; a weight that is not given is 1.
Tensor combine(const Tensor& any_y, const OptionalTensor& weights, const OptionalTensor& any_residual,
               const Tensor& row_of_slot, int64_t K, at::ScalarType dtype) {
  const Tensor y = with_dense_rows(any_y);
  const int64_t N = row_of_slot.numel() / K, D = y.size(1);
  check(y, weights, row_of_slot, N, K);
  OptionalTensor residual;
  if (any_residual) residual = with_dense_rows(*any_residual);
  TORCH_CHECK(!residual || (residual->sizes() == at::IntArrayRef({N, D}) && residual->scalar_type() == dtype),
              "residual must be [N, D], in ", dtype);
  const Tensor out = at::empty({N, D}, y.options().dtype(dtype));
  by_stored_types(y, dtype, [&](auto s, auto r) {
    using S = decltype(s);
    using R = decltype(r);
    const auto* of_slot = data<ComputeType<S>>(weights);
    const auto blocks = row_blocks({0, N}, kTokens);
    for_each_task(blocks.size(), [&](int64_t task) {
      for (int64_t n = blocks[task].begin; n < blocks[task].end; ++n)
        combine_token(data<S>(y), y.stride(0), data<int64_t>(row_of_slot) + n * K, of_slot ? of_slot + n * K : nullptr,
                      K, residual ? data<R>(residual) + n * residual->stride(0) : nullptr, D, data<R>(out) + n * D);
    });
  });
  return out;
}

// dy [N K, D], its rows sorted like those of y, and dweights [N, K].
std::tuple<Tensor, Tensor> combine_backward(const Tensor& any_dout, const Tensor& any_y, const Tensor& weights,
                                            const Tensor& row_of_slot) {
  const Tensor dout = with_dense_rows(any_dout), y = with_dense_rows(any_y);
  const int64_t N = weights.size(0), K = weights.size(1), D = y.size(1);
  check(y, weights, row_of_slot, N, K);
  TORCH_CHECK(dout.sizes() == at::IntArrayRef({N, D}), "dout must be [N, D]");
  const Tensor dy = at::empty({N * K, D}, y.options()), dweights = at::empty({N, K}, weights.options());
  by_stored_types(y, dout.scalar_type(), [&](auto s, auto r) {
    using S = decltype(s);
    using R = decltype(r);
    using T = ComputeType<S>;
    const auto blocks = row_blocks({0, N}, kTokens);
    for_each_task(blocks.size(), [&](int64_t task) {
      for (int64_t slot = blocks[task].begin * K; slot < blocks[task].end * K; ++slot) {
        const int64_t row = data<int64_t>(row_of_slot)[slot];
        const R* gradient = data<R>(dout) + slot / K * dout.stride(0);
        const S* of_y = data<S>(y) + row * y.stride(0);
        S* to = data<S>(dy) + row * D;
        const T weight = data<T>(weights)[slot];
        Vector<T> product{};
        for_each_vector<T>(D, [&](int64_t c, auto part) {
          const Vector<T> own = load(gradient + c, part);
          product += own * load(of_y + c, part);
          store(to + c, weight * own, part);
        });
        data<T>(dweights)[slot] = sum(product);
      }
    });
  });
  return {dy, dweights};
}

}  // namespace

// The schemas stand in routing.py.
TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("combine", &combine);
  m.impl("combine_backward", &combine_backward);
}

}  // namespace moxe

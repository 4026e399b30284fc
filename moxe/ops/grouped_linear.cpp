// Block-diagonal products of packed rows; `cpu/block_linear.h` says how they are computed.
//
// Legend: N rows, E groups, Q blocks, I inputs and O outputs of a block.

#include "cpu/block_linear.h"

namespace moxe {
namespace {

BlockShape shape_of(const Tensor& weight) { return {weight.size(1), weight.size(2), weight.size(3)}; }

// x [N, Q, I] as blocks; rows may lie apart.
template <class S, class T>
Blocks<S> blocks_of(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.size(2)};
}

void check(const Tensor& x, const Tensor& weight) {
  const bool dense = (x.stride(2) == 1 || x.size(2) <= 1) && (x.stride(1) == x.size(2) || x.size(1) <= 1);
  TORCH_CHECK(dense, "the blocks of a row must lie side by side");
  TORCH_CHECK(weight.is_contiguous() && weight.dtype() == core_options(x).dtype(),
              "weight must be contiguous and of the type that x is computed in");
}

Tensor grouped_block_linear(const Tensor& x, const Tensor& weight, at::IntArrayRef row_offsets) {
  check(x, weight);
  const BlockShape shape = shape_of(weight);
  Tensor y = at::empty({x.size(0), shape.blocks, shape.outputs}, x.options());
  by_stored_type(x, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    block_linear<S, S>(shape, row_offsets, blocks_of<const S, S>(x), data<T>(weight), {}, blocks_of<S, S>(y));
  });
  return y;
}

// Gradients of x and of the weight; an empty tensor for the one that is not needed.
std::tuple<Tensor, Tensor> grouped_block_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                         at::IntArrayRef row_offsets, bool needs_dx,
                                                         bool needs_dweight) {
  check(x, weight);
  TORCH_CHECK(dy.is_contiguous() && dy.dtype() == x.dtype(), "dy must be contiguous and stored as x");
  const BlockShape shape = shape_of(weight);
  Tensor dx = needs_dx ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Tensor dweight = needs_dweight ? at::empty(weight.sizes(), weight.options()) : at::empty({0}, weight.options());
  by_stored_type(x, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    block_linear_backward<S, S>(shape, row_offsets, blocks_of<const S, S>(x), weight, blocks_of<const S, S>(dy),
                                needs_dx ? blocks_of<S, S>(dx) : Blocks<S>{},
                                needs_dweight ? data<T>(dweight) : nullptr, {});
  });
  return {dx, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("grouped_block_linear", &grouped_block_linear);
  m.impl("grouped_block_linear_backward", &grouped_block_linear_backward);
}

}  // namespace moxe

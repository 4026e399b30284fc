// Block-diagonal products of packed rows; `cpu/block_linear.h` says how they are computed. And full products of a few
// rows, as in decoding; `cpu/matrix_vector.h` has those.
//
// Legend: N rows, E groups, Q blocks, I inputs and O outputs of a block (or of a full product).

#include "cpu/block_linear.h"
#include "cpu/matrix_vector.h"

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

// Outputs that one task computes.
constexpr int64_t kOutputsOfTask = 128;

// x [N, I] in the type of computation, weight [E, O, I], y [N, O] stored as S.
template <class W, class S, class T = ComputeType<S>>
void few_rows(const Tensor& x, const Tensor& weight, at::IntArrayRef row_offsets, const Tensor& y) {
  const int64_t outputs = weight.size(1), inputs = weight.size(2);
  const int64_t blocks = (outputs + kOutputsOfTask - 1) / kOutputsOfTask;
  const auto rows = row_blocks(row_offsets, 1);
  for_each_task(static_cast<int64_t>(rows.size()) * blocks, [&](int64_t task) {
    const auto& [group, row, end] = rows[task / blocks];
    const int64_t first = task % blocks * kOutputsOfTask;
    matrix_vector(std::min(kOutputsOfTask, outputs - first), inputs, data<const T>(x) + row * inputs,
                  data<const W>(weight) + (group * outputs + first) * inputs, inputs,
                  data<S>(y) + row * outputs + first);
  });
}

Tensor few_rows_linear(const Tensor& x, const Tensor& weight, at::IntArrayRef row_offsets) {
  TORCH_CHECK(weight.is_contiguous(), "weight must be contiguous");
  Tensor y = at::empty({x.size(0), weight.size(1)}, x.options());
  const Tensor rows = x.to(core_options(x)).contiguous();
  by_stored_type(x, [&](auto stored) {
    using S = decltype(stored);
    if constexpr (std::is_same_v<S, double>) {
      TORCH_CHECK(weight.scalar_type() == at::kDouble, "weight must be float64 as x is");
      few_rows<double, S>(rows, weight, row_offsets, y);
    } else if (weight.scalar_type() == at::kBFloat16) {
      few_rows<BFloat16, S>(rows, weight, row_offsets, y);
    } else {
      TORCH_CHECK(weight.scalar_type() == at::kFloat, "weight must be float32 or bfloat16");
      few_rows<float, S>(rows, weight, row_offsets, y);
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("few_rows_linear", &few_rows_linear);
  m.impl("grouped_block_linear", &grouped_block_linear);
  m.impl("grouped_block_linear_backward", &grouped_block_linear_backward);
}

}  // namespace moxe

// The gates of the sLSTM before the recurrence: two block-diagonal products and a bias, written into one tensor.
//
// Legend: N rows, E groups, D channels, H heads, Dh = D / H.
//
//     [i, f][n, h] = convolved[n, h] W_if[e, h] + bias[e, h, :2 Dh]
//     [z, o][n, h] = normed[n, h] W_zo[e, h] + bias[e, h, 2 Dh:]
//
// A head's four gates lie side by side, [N, H, 4, Dh]: each product fills, and each gradient reads, one half of every
// head's 4 Dh numbers. `cpu/block_linear.h` says how. Rows may be stored as bfloat16; gates are as precise as weights.

#include "cpu/block_linear.h"

namespace moxe {
namespace {

// Of one of the two products: its rows, its weight, and which half of the gates it makes.
struct Half {
  const Tensor& rows;
  const Tensor& weight;
  int64_t index;
};

BlockShape shape_of(const Half& half) { return {half.weight.size(1), half.weight.size(2), half.weight.size(3)}; }

template <class S, class T>
Blocks<S> blocks_of(const Tensor& rows, const Half& half) {
  return {data<T>(rows), rows.stride(0), half.weight.size(2)};
}

// Half of the gates [N, H, 4, Dh], or of the bias [E, H, 4 Dh].
template <class S, class T>
Blocks<S> gates_of(const Tensor& gates, const Half& half) {
  const int64_t outputs = half.weight.size(3), blocks = half.weight.size(1);
  return {data<T>(gates) + half.index * outputs, blocks * 2 * outputs, 2 * outputs};
}
template <class S, class T>
BlockBias<S> bias_of(const Tensor& bias, const Half& half) {
  const int64_t outputs = half.weight.size(3);
  return {data<T>(bias) + half.index * outputs, 2 * outputs};
}

void check(const Half& half, const Tensor& other) {
  TORCH_CHECK(half.rows.stride(1) == 1 || half.rows.size(1) <= 1, "the channels of a row must lie side by side");
  TORCH_CHECK(half.rows.dtype() == other.dtype(), "the rows of both products must be stored alike");
  TORCH_CHECK(half.weight.is_contiguous() && half.weight.dtype() == core_options(other).dtype(),
              "weights must be contiguous and of the type that rows are computed in");
}

Tensor slstm_gates(const Tensor& convolved, const Tensor& normed, const Tensor& if_weight, const Tensor& zo_weight,
                   const Tensor& bias, at::IntArrayRef row_offsets) {
  const Half halves[] = {{convolved, if_weight, 0}, {normed, zo_weight, 1}};
  TORCH_CHECK(bias.is_contiguous() && bias.dtype() == if_weight.dtype(), "the bias must be contiguous, as the weights");
  Tensor gates = at::empty({normed.size(0), if_weight.size(1), 4, if_weight.size(2)}, if_weight.options());
  for (const Half& half : halves) {
    check(half, convolved);
    by_stored_type(half.rows, [&](auto stored) {
      using S = decltype(stored);
      using T = ComputeType<S>;
      block_linear<S, T>(shape_of(half), row_offsets, blocks_of<const S, S>(half.rows, half), data<T>(half.weight),
                         bias_of<const T, T>(bias, half), gates_of<T, T>(gates, half));
    });
  }
  return gates;
}

// Gradients of both rows, both weights and the bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> slstm_gates_backward(const Tensor& dgates, const Tensor& convolved,
                                                                        const Tensor& normed, const Tensor& if_weight,
                                                                        const Tensor& zo_weight,
                                                                        at::IntArrayRef row_offsets) {
  TORCH_CHECK(dgates.is_contiguous() && dgates.dtype() == if_weight.dtype(),
              "the gates' gradients must be contiguous, as the weights");
  const Half halves[] = {{convolved, if_weight, 0}, {normed, zo_weight, 1}};
  Tensor drows[2], dweights[2];
  Tensor dbias = at::empty({if_weight.size(0), if_weight.size(1), 4 * if_weight.size(2)}, if_weight.options());
  for (const Half& half : halves) {
    check(half, convolved);
    drows[half.index] = at::empty(half.rows.sizes(), half.rows.options());
    dweights[half.index] = at::empty(half.weight.sizes(), half.weight.options());
    by_stored_type(half.rows, [&](auto stored) {
      using S = decltype(stored);
      using T = ComputeType<S>;
      block_linear_backward<S, T>(shape_of(half), row_offsets, blocks_of<const S, S>(half.rows, half), half.weight,
                                  gates_of<const T, T>(dgates, half), blocks_of<S, S>(drows[half.index], half),
                                  data<T>(dweights[half.index]), bias_of<T, T>(dbias, half));
    });
  }
  return {drows[0], drows[1], dweights[0], dweights[1], dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("slstm_gates", &slstm_gates);
  m.impl("slstm_gates_backward", &slstm_gates_backward);
}

}  // namespace moxe

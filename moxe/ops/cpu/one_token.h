// What a step op of either block needs: which rows go to which of its blocks, and a block's parts that see one token.
//
// Legend: N rows (row b of the state is row b), K choices a row, E blocks, D hidden size, C channels, T taps.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/matrix_vector.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"
#include "norm.h"

namespace moxe {

// A row that goes to a block; `weight` f(x) of that block is added to the row's output.
struct Choice {
  int64_t row, block;
  double weight;
};

// Those of choices [N, K] that are among blocks [first, first + blocks), row by row; `block` counts from `first`.
inline std::vector<Choice> choices_among(const Tensor& experts, const Tensor& weights, int64_t first, int64_t blocks) {
  TORCH_CHECK(experts.dim() == 2 && experts.sizes() == weights.sizes() && experts.scalar_type() == at::kLong,
              "experts and weights must be [N, K], and experts int64");
  const Tensor blocks_of_rows = experts.contiguous(), weights_of_rows = weights.to(at::kDouble).contiguous();
  const int64_t* block = data<int64_t>(blocks_of_rows);
  const double* weight = data<double>(weights_of_rows);
  const int64_t choices_of_row = experts.size(1);
  std::vector<Choice> choices;
  for (int64_t row = 0; row < experts.size(0); ++row, block += choices_of_row, weight += choices_of_row)
    for (int64_t k = 0; k < choices_of_row; ++k) {
      if (block[k] < first || block[k] >= first + blocks) continue;
      TORCH_CHECK(std::find(block, block + k, block[k]) == block + k, "row ", row, " chooses block ", block[k],
                  " twice");
      choices.push_back({row, block[k] - first, weight[k]});
    }
  return choices;
}

// Parameters as they are stored; where not all of them are stored alike, as copies in the type that is computed in.
template <size_t kCount>
std::array<Tensor, kCount> stored_alike(std::array<Tensor, kCount> parameters, at::ScalarType computed) {
  const auto other = [&](const Tensor& x) { return x.scalar_type() != parameters[0].scalar_type(); };
  const bool alike = std::none_of(parameters.begin(), parameters.end(), other);
  for (Tensor& x : parameters) {
    if (!alike) x = x.to(computed);
    if (!x.is_contiguous()) x = x.contiguous();
  }
  return parameters;
}

// Where a contiguous parameter [E, ...] or state [B, E, ...] holds what belongs to a block.
template <class S>
S* of_block(const Tensor& parameter, int64_t block) {
  return data<S>(parameter) + block * (parameter.numel() / parameter.size(0));
}
template <class S>
S* of_choice(const Tensor& state, const Choice& choice) {
  const int64_t blocks = state.size(1);
  return data<S>(state) + (choice.row * blocks + choice.block) * (state.numel() / (state.size(0) * blocks));
}

inline void check_rows(const Tensor& x, const Tensor& experts, const Tensor& out) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) == experts.size(0) && x.sizes() == out.sizes() && x.is_contiguous() &&
                  out.is_contiguous() && x.dtype() == out.dtype() && x.dtype() == core_options(x).dtype(),
              "x and out must be contiguous [N, D], both float32 or both float64");
}

// Parameters against their sizes, in order.
template <size_t kCount>
void check_parameters(const std::array<Tensor, kCount>& parameters, const std::array<at::DimVector, kCount>& sizes) {
  for (size_t i = 0; i < kCount; ++i)
    TORCH_CHECK(parameters[i].sizes() == at::IntArrayRef(sizes[i]), "parameter ", i, " must be of sizes ",
                at::IntArrayRef(sizes[i]), ", not ", parameters[i].sizes());
}

inline void check_state(const Tensor& state, const Tensor& x, at::IntArrayRef of_choice) {
  std::vector<int64_t> sizes = {x.size(0)};
  sizes.insert(sizes.end(), of_choice.begin(), of_choice.end());
  TORCH_CHECK(state.is_contiguous() && state.sizes() == sizes, "a state must be contiguous ", sizes, ", not ",
              state.sizes());
}

// For autograd, as an operation of torch's own would that works in place.
inline void mark_as_changed(std::initializer_list<Tensor> tensors) {
  for (const Tensor& x : tensors)
    if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

// Asks for all of an array that the task will read, before its first product waits for the first line of it.
template <class S>
void fetch_all(const S* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < count; i += kLine) fetch(from + i);
}

// y = (x - mean) rstd w over one row.
template <class T, class W>
void normalise(const T* x, const W* weight, int64_t size, T eps, T* y) {
  const auto [mean, rstd] = statistics(x, size, eps);
  for_each_vector<T>(size, [&](int64_t c, auto part) {
    store(y + c, (load(x + c, part) - mean) * rstd * load(weight + c, part), part);
  });
}

// The taps of a block, [C, T] and [C].
template <class W>
struct Taps {
  const W *weight, *bias;
  int64_t count, channels;
};

// y = SiLU(convolution) of channels [begin, end) behind the T - 1 inputs of state [T - 1, C], which then takes x in.
template <class T, class W, class S>
void convolve(const Taps<W>& taps, int64_t begin, int64_t end, const T* x, S* state, T* y) {
  const int64_t before = taps.count - 1;
  for (int64_t c = begin; c < end; ++c) {
    const W* weight = taps.weight + c * taps.count;
    T p = widen(taps.bias[c]);
    for (int64_t j = 0; j < before; ++j) p += widen(weight[j]) * widen(state[j * taps.channels + c]);
    y[c] = p + widen(weight[before]) * x[c];
  }
  for_each_vector<T>(end - begin, [&](int64_t c, auto part) {
    store(y + begin + c, silu(load(y + begin + c, part)), part);
  });
  for (int64_t j = 0; j < before; ++j) {
    S* to = state + j * taps.channels;
    if (j + 1 < before)
      std::copy(to + taps.channels + begin, to + taps.channels + end, to + begin);
    else
      for (int64_t c = begin; c < end; ++c) to[c] = narrow<S>(x[c]);
  }
}

// Pieces of at most `most` of `count` things.
struct Pieces {
  int64_t count, most;

  int64_t number() const { return (count + most - 1) / most; }
  int64_t begin(int64_t piece) const { return piece * most; }
  int64_t end(int64_t piece) const { return std::min(begin(piece) + most, count); }
};

// Outputs of a product that one task computes.
constexpr int64_t kOutputsOfStep = 32;

// out[n] += weight f(i, begin, end) for the choices i of row n in order; f writes outputs [begin, end) to its last
// argument.
template <class T, class F>
void add_outputs(const std::vector<Choice>& choices, const Tensor& out, const F& f) {
  const Pieces pieces{out.size(1), kOutputsOfStep};
  for_each_task(out.size(0) * pieces.number(), [&](int64_t task) {
    const int64_t row = task / pieces.number(), begin = pieces.begin(task % pieces.number());
    const int64_t end = pieces.end(task % pieces.number());
    T of_choice[kOutputsOfStep];
    T* const to = data<T>(out) + row * out.size(1);
    for (size_t i = 0; i < choices.size(); ++i) {
      if (choices[i].row != row) continue;
      f(i, begin, end, of_choice);
      for (int64_t o = begin; o < end; ++o) to[o] += static_cast<T>(choices[i].weight) * of_choice[o - begin];
    }
  });
}

}  // namespace moxe

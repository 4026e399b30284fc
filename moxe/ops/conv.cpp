// Causal depthwise convolution over segments, with SiLU behind it if asked for.
//
// Legend: N packed tokens, C channels, T taps, G segments, E groups (weight sets).
//
//     p_t = bias + sum_j w_j x_{t - (T - 1) + j}      y_t = p_t, or silu(p_t)
//     g_t = dy_t, or dy_t silu'(p_t)                  dx_s = sum_j w_j g_{s + (T - 1) - j}
//     dw_j = sum_t g_t x_{t - (T - 1) + j}            dbias = sum_t g_t
//
// Tokens are taken in tiles of a few rows, and inside a tile channel by channel: the taps stay in registers for the
// rows of a tile, and every row is still read from its first channel to its last. p is computed again from x in the
// backward pass; g of a block of tokens, and of the T - 1 behind it, waits in the second-level cache for dx.

#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

#include <algorithm>

namespace moxe {
namespace {

constexpr int64_t kTileTokens = 8;
constexpr int64_t kTaskTokens = 64;

// Tokens [begin, end) of a segment, which begins at token `first` and ends before token `last`.
struct Block {
  int64_t segment, begin, end, first, last;
};

// Consecutive blocks of one group: a long piece of a segment, or several short segments.
struct Task {
  int64_t group;
  std::vector<Block> blocks;
};

std::vector<Task> share_out(const Tensor& cu_seqlens, at::IntArrayRef group_offsets) {
  const int64_t* cu = data<int64_t>(cu_seqlens);
  std::vector<Task> tasks;
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(group_offsets.size()); ++e) {
    int64_t room = 0;
    for (int64_t g = group_offsets[e]; g < group_offsets[e + 1]; ++g)
      for (int64_t begin = cu[g]; begin < cu[g + 1];) {
        if (room == 0) {
          tasks.push_back({e, {}});
          room = kTaskTokens;
        }
        const int64_t end = std::min(begin + room, cu[g + 1]);
        tasks.back().blocks.push_back({g, begin, end, cu[g], cu[g + 1]});
        room -= end - begin;
        begin = end;
      }
  }
  return tasks;
}

// [E, C, T] -> [E, T, C]
template <class T>
Tensor tap_by_tap(const Tensor& weight) {
  const int64_t groups = weight.size(0), channels = weight.size(1), taps = weight.size(2);
  Tensor packed = at::empty({groups, taps, channels}, weight.options());
  for_each_task(groups, [&](int64_t e) {
    const int64_t start = e * channels * taps;
    transpose(channels, taps, data<T>(weight) + start, taps, data<T>(packed) + start, channels);
  });
  return packed;
}

// Inputs by token: a segment's own, or what the initial state says came before it.
template <class S>
struct Inputs {
  const S* x;
  int64_t x_row;
  const S* state;  // [G, T - 1, C], or null: zeros
  int64_t taps, channels;
  std::vector<S> zeros;

  Inputs(const Tensor& x, const OptionalTensor& state, int64_t taps)
      : x(data<S>(x)), x_row(x.stride(0)), state(data<S>(state)), taps(taps), channels(x.size(1)), zeros(channels) {}

  const S* at(const Block& block, int64_t token) const {
    if (token >= block.first) return x + token * x_row;
    return state ? state + (block.segment * (taps - 1) + token - block.first + taps - 1) * channels : zeros.data();
  }
  // The rows that the windows of `count` tokens from `token` on cover.
  void window(const Block& block, int64_t token, int64_t count, const S** rows) const {
    for (int64_t i = 0; i < count + taps - 1; ++i) rows[i] = at(block, token - (taps - 1) + i);
  }
};

// The taps of one vector of channels; kTaps = 0 stands for a number of taps that only the caller knows.
template <class T, int kTaps, class L>
struct Taps {
  Vector<T> held[std::max(kTaps, 1)];
  const T* from;
  int64_t count, channels;
  L lanes;

  Taps(const T* weight, int64_t taps, int64_t channels, L lanes)
      : from(weight), count(kTaps ? kTaps : taps), channels(channels), lanes(lanes) {
    for (int j = 0; j < kTaps; ++j) held[j] = load(weight + j * channels, lanes);
  }
  Vector<T> operator[](int64_t j) const {
    if constexpr (kTaps > 0) return held[j];
    return load(from + j * channels, lanes);
  }
};

template <class V, class S, class TapsOf, class L>
inline V pre_activation(V bias, const TapsOf& taps, const S* const* window, int64_t c, L lanes) {
  V p = bias;
  for (int64_t j = 0; j < taps.count; ++j) p += taps[j] * load(window[j] + c, lanes);
  return p;
}

template <class S, int kTaps>
void convolve(const Inputs<S>& inputs, const Task& task, const ComputeType<S>* weight, const ComputeType<S>* bias,
              bool with_silu, S* y) {
  using T = ComputeType<S>;
  const int64_t channels = inputs.channels;
  Scratch scratch(Scratch::bytes_of<const S*>(kTileTokens + inputs.taps));
  const S** rows = scratch.take<const S*>(kTileTokens + inputs.taps);
  for (const Block& block : task.blocks)
    for (int64_t token = block.begin; token < block.end; token += kTileTokens) {
      const int64_t count = std::min(kTileTokens, block.end - token);
      inputs.window(block, token, count, rows);
      for_each_vector<T>(channels, [&](int64_t c, auto lanes) {
        const Taps<T, kTaps, decltype(lanes)> taps(weight + c, inputs.taps, channels, lanes);
        const auto shift = load(bias + c, lanes);
        for (int64_t i = 0; i < count; ++i) {
          const auto p = pre_activation(shift, taps, rows + i, c, lanes);
          store(y + (token + i) * channels + c, with_silu ? silu(p) : p, lanes);
        }
      });
    }
}

// Where a task's gradients go.
template <class S>
struct Gradients {
  const S* dy;                 // [N, C]
  S* dx;                       // [N, C]
  S* dstate;                   // [G, T - 1, C], or null
  ComputeType<S>* parameters;  // [T + 1, C]: the task's part of each tap's gradient, and of the bias's
};

// g of the tokens [begin, end), in rows from `g` on; adds to the parameters' gradients if `own`.
template <class S, int kTaps>
void gradient_of_pre_activation(const Inputs<S>& inputs, const Block& block, int64_t begin, int64_t end,
                                const ComputeType<S>* weight, const ComputeType<S>* bias, bool with_silu, bool own,
                                const Gradients<S>& gradients, const S** rows, ComputeType<S>* g) {
  using T = ComputeType<S>;
  const int64_t channels = inputs.channels;
  for (int64_t token = begin; token < end; token += kTileTokens) {
    const int64_t count = std::min(kTileTokens, end - token);
    inputs.window(block, token, count, rows);
    for_each_vector<T>(channels, [&](int64_t c, auto lanes) {
      const Taps<T, kTaps, decltype(lanes)> taps(weight + c, inputs.taps, channels, lanes);
      const auto shift = load(bias + c, lanes);
      Vector<T> held[kTileTokens];
      Vector<T> total = {};
      for (int64_t i = 0; i < count; ++i) {
        held[i] = load(gradients.dy + (token + i) * channels + c, lanes);
        if (with_silu) held[i] *= silu_slope(pre_activation(shift, taps, rows + i, c, lanes));
        store(g + (token - begin + i) * channels + c, held[i], lanes);
        total += held[i];
      }
      if (!own) return;
      T* sums = gradients.parameters + c;
      for (int64_t j = 0; j < taps.count; ++j, sums += channels) {
        Vector<T> of_tap = load(sums, lanes);
        for (int64_t i = 0; i < count; ++i) of_tap += held[i] * load(rows[i + j] + c, lanes);
        store(sums, of_tap, lanes);
      }
      store(sums, load(sums, lanes) + total, lanes);
    });
  }
}

// Inputs [begin, end), counted from the first row of g; those before it, of the initial state, meet no g before it.
template <class S, int kTaps>
void gradient_of_inputs(int64_t begin, int64_t end, int64_t num_taps, int64_t channels, const ComputeType<S>* weight,
                        const ComputeType<S>* g, S* dx) {
  using T = ComputeType<S>;
  for (int64_t token = begin; token < end; token += kTileTokens) {
    const int64_t stop = std::min(token + kTileTokens, end);
    for_each_vector<T>(channels, [&](int64_t c, auto lanes) {
      const Taps<T, kTaps, decltype(lanes)> taps(weight + c, num_taps, channels, lanes);
      for (int64_t s = token; s < stop; ++s) {
        Vector<T> total = {};
        const int64_t most = std::min(taps.count, s + taps.count);
        for (int64_t j = 0; j < most; ++j) total += taps[j] * load(g + (s + taps.count - 1 - j) * channels + c, lanes);
        store(dx + (s - begin) * channels + c, total, lanes);
      }
    });
  }
}

template <class S, int kTaps>
void convolve_backward(const Inputs<S>& inputs, const Task& task, const ComputeType<S>* weight,
                       const ComputeType<S>* bias, bool with_silu, const Gradients<S>& gradients) {
  using T = ComputeType<S>;
  const int64_t channels = inputs.channels, before = inputs.taps - 1;
  const int64_t most_rows = (kTaskTokens + before) * channels;
  Scratch scratch(Scratch::bytes_of<const S*>(kTileTokens + before) + Scratch::bytes_of<T>(most_rows));
  const S** rows = scratch.take<const S*>(kTileTokens + before);
  T* g = scratch.take<T>(most_rows);
  std::fill_n(gradients.parameters, (inputs.taps + 1) * channels, T(0));
  for (const Block& block : task.blocks) {
    const int64_t length = block.end - block.begin, behind = std::min(block.end + before, block.last);
    gradient_of_pre_activation<S, kTaps>(inputs, block, block.begin, block.end, weight, bias, with_silu, true,
                                         gradients, rows, g);
    gradient_of_pre_activation<S, kTaps>(inputs, block, block.end, behind, weight, bias, with_silu, false, gradients,
                                         rows, g + length * channels);
    const int64_t known = behind - block.begin;
    std::fill(g + known * channels, g + (length + before) * channels, T(0));
    gradient_of_inputs<S, kTaps>(0, length, inputs.taps, channels, weight, g, gradients.dx + block.begin * channels);
    if (gradients.dstate && block.begin == block.first)
      gradient_of_inputs<S, 0>(-before, 0, inputs.taps, channels, weight, g,
                               gradients.dstate + block.segment * before * channels);
  }
}

// Adds up what the tasks of each group found, in the order of the tasks.
template <class T>
void add_up(const std::vector<Task>& tasks, const Tensor& parts, Tensor& dweight, Tensor& dbias) {
  const int64_t groups = dweight.size(0), channels = dweight.size(1), taps = dweight.size(2);
  for_each_task(groups * (taps + 1), [&](int64_t task) {
    const int64_t e = task / (taps + 1), j = task % (taps + 1);
    Scratch scratch(Scratch::bytes_of<T>(channels));
    T* total = scratch.take<T>(channels);
    std::fill_n(total, channels, T(0));
    for (size_t i = 0; i < tasks.size(); ++i) {
      if (tasks[i].group != e) continue;
      const T* part = data<T>(parts) + (i * (taps + 1) + j) * channels;
      for (int64_t c = 0; c < channels; ++c) total[c] += part[c];
    }
    T* to = j < taps ? data<T>(dweight) + e * channels * taps + j : data<T>(dbias) + e * channels;
    const int64_t step = j < taps ? taps : 1;
    for (int64_t c = 0; c < channels; ++c) to[c * step] = total[c];
  });
}

void check(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& state) {
  TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, "the channels of x must lie side by side");
  TORCH_CHECK(weight.is_contiguous() && bias.is_contiguous(), "weight and bias must be contiguous");
  const auto parameters = core_options(x).dtype();
  TORCH_CHECK(weight.dtype() == parameters && bias.dtype() == parameters, "weight and bias must be ", parameters);
  if (state) TORCH_CHECK(state->is_contiguous() && state->dtype() == x.dtype(), "the state must be laid out as x");
}

Tensor causal_conv(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& state,
                   const Tensor& cu_seqlens, at::IntArrayRef group_offsets, bool with_silu) {
  check(x, weight, bias, state);
  Tensor y = at::empty(x.sizes(), x.options());
  const auto tasks = share_out(cu_seqlens, group_offsets);
  const int64_t channels = weight.size(1), taps = weight.size(2);
  by_stored_type(x, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const Inputs<S> inputs(x, state, taps);
    const Tensor packed = tap_by_tap<T>(weight);
    for_each_task(tasks.size(), [&](int64_t i) {
      const int64_t e = tasks[i].group;
      const auto run = taps == 4 ? convolve<S, 4> : convolve<S, 0>;
      run(inputs, tasks[i], data<T>(packed) + e * taps * channels, data<T>(bias) + e * channels, with_silu, data<S>(y));
    });
  });
  return y;
}

// Gradients of x, weight, bias and, where there is one, of the initial state (else an empty tensor).
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                                const Tensor& bias, const OptionalTensor& state,
                                                                const Tensor& cu_seqlens,
                                                                at::IntArrayRef group_offsets, bool with_silu) {
  check(x, weight, bias, state);
  TORCH_CHECK(dy.is_contiguous() && dy.dtype() == x.dtype(), "dy must be contiguous and stored as x");
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dweight = at::empty(weight.sizes(), weight.options()), dbias = at::empty(bias.sizes(), bias.options());
  Tensor dstate = state ? at::zeros(state->sizes(), state->options()) : at::empty({0}, x.options());
  const auto tasks = share_out(cu_seqlens, group_offsets);
  const int64_t channels = weight.size(1), taps = weight.size(2);
  const Tensor parts = at::empty({static_cast<int64_t>(tasks.size()), taps + 1, channels}, weight.options());
  by_stored_type(x, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const Inputs<S> inputs(x, state, taps);
    const Tensor packed = tap_by_tap<T>(weight);
    for_each_task(tasks.size(), [&](int64_t i) {
      const int64_t e = tasks[i].group;
      const Gradients<S> gradients = {data<S>(dy), data<S>(dx), state ? data<S>(dstate) : nullptr,
                                      data<T>(parts) + i * (taps + 1) * channels};
      const auto run = taps == 4 ? convolve_backward<S, 4> : convolve_backward<S, 0>;
      run(inputs, tasks[i], data<T>(packed) + e * taps * channels, data<T>(bias) + e * channels, with_silu, gradients);
    });
    add_up<T>(tasks, parts, dweight, dbias);
  });
  return {dx, dweight, dbias, dstate};
}

// The last T - 1 inputs of each segment, [G, T - 1, C].
Tensor causal_conv_state(const Tensor& x, const OptionalTensor& state, const Tensor& cu_seqlens, int64_t taps) {
  const int64_t segments = cu_seqlens.size(0) - 1, channels = x.size(1), before = taps - 1;
  Tensor last = at::empty({segments, before, channels}, x.options());
  const int64_t* cu = data<int64_t>(cu_seqlens);
  by_stored_type(x, [&](auto stored) {
    using S = decltype(stored);
    const Inputs<S> inputs(x, state, taps);
    for (int64_t g = 0; g < segments; ++g) {
      const Block block = {g, cu[g], cu[g + 1], cu[g], cu[g + 1]};
      for (int64_t i = 0; i < before; ++i)
        std::copy_n(inputs.at(block, block.end - before + i), channels, data<S>(last) + (g * before + i) * channels);
    }
  });
  return last;
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("causal_conv", &causal_conv);
  m.impl("causal_conv_backward", &causal_conv_backward);
  m.impl("causal_conv_state", &causal_conv_state);
}

}  // namespace moxe

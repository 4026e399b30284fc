// Cross-entropy of rows of logits and, in their place, its gradient.
//
// Legend: R rows, V vocabulary.
//
//     loss_r = log sum_v e^{x_rv} - x_r,target        x_rv becomes e^{x_rv} / sum e^{x_r.} - [v = target]
//
// A row stays in a near cache while it is read three times: its maximum, its sum, its gradient.

#include "cpu/tensor.h"

#include <algorithm>

namespace moxe {
namespace {

constexpr int64_t kIgnored = -100;

// f(vector) over whole vectors of a row, g(number) over what is left.
template <class S, class F, class G>
void over_row(S* row, int64_t count, const F& f, const G& g) {
  int64_t v = 0;
  for (; v + kLanes<ComputeType<S>> <= count; v += kLanes<ComputeType<S>>) f(row + v);
  for (; v < count; ++v) g(row + v);
}

template <class S, class T = ComputeType<S>>
T loss_of_row(S* row, int64_t count, int64_t target, bool wants_gradient) {
  if (target == kIgnored) {
    if (wants_gradient) std::fill(row, row + count, narrow<S>(T(0)));
    return 0;
  }
  Vector<T> highest = fill(-std::numeric_limits<T>::infinity());
  T highest_rest = -std::numeric_limits<T>::infinity();
  over_row(
      row, count, [&](S* x) { highest = maximum(highest, load(x)); },
      [&](S* x) { highest_rest = std::max(highest_rest, T(widen(*x))); });
  for (int lane = 0; lane < kLanes<T>; ++lane) highest_rest = std::max(highest_rest, T(highest[lane]));
  const Vector<T> shift = fill(highest_rest);

  Vector<T> total{};
  T total_rest = 0;
  over_row(
      row, count, [&](S* x) { total += exp(load(x) - shift); },
      [&](S* x) { total_rest += std::exp(T(widen(*x)) - highest_rest); });
  const T normaliser = sum(total) + total_rest;
  const T loss = std::log(normaliser) + highest_rest - widen(row[target]);
  if (!wants_gradient) return loss;

  const T scale = 1 / normaliser, of_target = std::exp(T(widen(row[target])) - highest_rest) * scale - 1;
  over_row(
      row, count, [&](S* x) { store(x, exp(load(x) - shift) * scale); },
      [&](S* x) { *x = narrow<S>(std::exp(T(widen(*x)) - highest_rest) * scale); });
  row[target] = narrow<S>(of_target);
  return loss;
}

// Losses [R] (float32, float64 for float64) of logits [R, V] and targets [R]; a target of -100 loses nothing.
Tensor softmax_cross_entropy_(const Tensor& logits, const Tensor& targets, bool wants_gradient) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  TORCH_CHECK(logits.is_contiguous() && targets.is_contiguous(), "logits and targets must be contiguous");
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.numel() == rows, "targets must be one int64 a row");
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t target = data<const int64_t>(targets)[r];
    TORCH_CHECK(target == kIgnored || (target >= 0 && target < vocabulary), "target ", target,
                " is outside the vocabulary: ids run from 0 to ", vocabulary - 1);
  }
  Tensor losses = at::empty({rows}, core_options(logits));
  by_stored_type(logits, [&](auto stored) {
    using S = decltype(stored);
    S* const x = data<S>(logits);
    const int64_t* const target = data<const int64_t>(targets);
    auto* const loss = data<ComputeType<S>>(losses);
    for_each_task(rows, [&](int64_t r) { loss[r] = loss_of_row(x + r * vocabulary, vocabulary, target[r], wants_gradient); });
  });
  return losses;
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) { m.impl("softmax_cross_entropy_", &softmax_cross_entropy_); }

}  // namespace moxe

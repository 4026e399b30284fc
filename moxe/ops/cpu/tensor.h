// What every op needs of torch: tensors, dispatch by dtype, tasks on torch's threads.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "cpu/vector.h"

namespace moxe {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class S>
inline S* data(const Tensor& x) {
  return static_cast<S*>(x.data_ptr());
}
template <class S>
inline S* data(const OptionalTensor& x) {
  return x.has_value() ? data<S>(*x) : nullptr;
}

template <class S>
constexpr at::ScalarType kScalarType = std::is_same_v<S, double>  ? at::kDouble
                                       : std::is_same_v<S, float> ? at::kFloat
                                                                  : at::kBFloat16;

// float64 for float64, else float32.
inline at::TensorOptions core_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Calls body(S{}) with the type that the numbers of x are stored in.
template <class F>
inline auto by_stored_type(const Tensor& x, const F& body) {
  switch (x.scalar_type()) {
    case at::kDouble: return body(double{});
    case at::kFloat: return body(float{});
    case at::kBFloat16: return body(BFloat16{});
    default: TORCH_CHECK(false, "backend 'cpu' knows float64, float32 and bfloat16, not ", x.scalar_type(),
                          ": use backend 'torch'");
  }
}

// Calls body(S{}, R{}) with the type that the numbers of x are stored in and that of a result of dtype `result`: float64
// for float64, else float32 or bfloat16.
template <class F>
inline auto by_stored_types(const Tensor& x, at::ScalarType result, const F& body) {
  if (x.scalar_type() == at::kDouble) {
    TORCH_CHECK(result == at::kDouble, "backend 'cpu': float64 is not stored as ", result);
    return body(double{}, double{});
  }
  TORCH_CHECK(result == at::kFloat || result == at::kBFloat16, "backend 'cpu' does not store ", result, " here");
  const bool narrow = result == at::kBFloat16;
  switch (x.scalar_type()) {
    case at::kFloat: return narrow ? body(float{}, BFloat16{}) : body(float{}, float{});
    case at::kBFloat16: return narrow ? body(BFloat16{}, BFloat16{}) : body(BFloat16{}, float{});
    default: TORCH_CHECK(false, "backend 'cpu' knows float64, float32 and bfloat16, not ", x.scalar_type(),
                          ": use backend 'torch'");
  }
}

// A matrix whose rows are consecutive numbers; the rows themselves may lie apart.
inline Tensor with_dense_rows(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous(); }

// Rows of consecutive numbers, which themselves may lie apart.
template <class S>
struct Rows {
  S* start;
  int64_t stride;

  S* at(int64_t n) const { return start + n * stride; }
};
template <class S>
Rows<S> rows_of(const Tensor& x) {
  return {data<S>(x), x.stride(0)};
}

// Runs body(0) to body(count - 1) on torch's threads, each task taken by the next free thread; the order of a task's own
// arithmetic does not depend on the number of threads.
template <class F>
inline void for_each_task(int64_t count, const F& body) {
#pragma omp parallel for schedule(dynamic) if (count > 1)
  for (int64_t task = 0; task < count; ++task) body(task);
}

// The rows [begin, end) of tasks that share out `rows` rows in blocks.
struct RowBlock {
  int64_t group, begin, end;
};

// Cuts the rows of each group into blocks of at most `most` rows.
inline std::vector<RowBlock> row_blocks(at::IntArrayRef row_offsets, int64_t most) {
  std::vector<RowBlock> blocks;
  for (size_t e = 0; e + 1 < row_offsets.size(); ++e)
    for (int64_t begin = row_offsets[e]; begin < row_offsets[e + 1]; begin += most)
      blocks.push_back({static_cast<int64_t>(e), begin, std::min(begin + most, row_offsets[e + 1])});
  return blocks;
}

// Adds up a parameter's gradient [E, C] from the sums of each block's rows, [blocks, C], in the order of the blocks:
// the result does not depend on which thread took which block.
template <class T>
inline Tensor sum_of_blocks(const std::vector<RowBlock>& blocks, const Tensor& of_block, int64_t groups) {
  constexpr int64_t kColumns = 128;
  const int64_t C = of_block.size(1);
  const Tensor total = at::zeros({groups, C}, of_block.options());
  for_each_task((C + kColumns - 1) / kColumns, [&](int64_t task) {
    const int64_t begin = task * kColumns, end = std::min(begin + kColumns, C);
    for (size_t b = 0; b < blocks.size(); ++b) {
      const T* from = data<T>(of_block) + b * C;
      T* to = data<T>(total) + blocks[b].group * C;
      for (int64_t c = begin; c < end; ++c) to[c] += from[c];
    }
  });
  return total;
}

}  // namespace moxe

// Layer normalisation without bias over each head of a row, times the weights of the row's group.
//
//     y = (x - mean) rstd w_e
//     dw_e = sum over the rows of e of dy (x - mean) rstd;  dx as in norm.h, dy w_e being the normalised row's gradient
//
// Legend: N rows, C channels, H heads of C / H channels, E groups.
//
// A task is a block of rows of one group, and a row is finished before the next: its head stays in the first cache
// between the passes over it, so memory is read and written once.
#include "norm.h"

#include "cpu/tensor.h"

namespace moxe {
namespace {

// Enough rows that a block's own sum of dw costs little beside them, few enough that 16 threads have work.
constexpr int64_t kRows = 64;

void check(const Tensor& x, const Tensor& weight, at::IntArrayRef row_offsets, int64_t heads) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(1) % heads == 0 &&
                  row_offsets.back() == x.size(0) && weight.size(0) + 1 == int64_t(row_offsets.size()),
              "x must be [N, C], weight [E, C] and row_offsets end at N");
  TORCH_CHECK(weight.is_contiguous() && weight.dtype() == core_options(x).dtype(), "weight must be dense, in ",
              core_options(x).dtype());
}

template <class S, class R>
void normalise_row(const S* x, const ComputeType<S>* weight, int64_t heads, int64_t size, double eps, R* y,
                   Statistics<ComputeType<S>>* of) {
  using T = ComputeType<S>;
  for (int64_t head = 0; head < heads; ++head, x += size, weight += size, y += size) {
    of[head] = statistics(x, size, T(eps));
    const auto [mean, rstd] = of[head];
    for_each_vector<T>(size, [&](int64_t c, auto part) {
      store(y + c, (load(x + c, part) - mean) * rstd * load(weight + c, part), part);
    });
  }
}

// y [N, C] in `dtype`, and mean and rstd [N, H, 2] for the backward pass.
std::tuple<Tensor, Tensor> stacked_layer_norm(const Tensor& any_x, const Tensor& weight, at::IntArrayRef row_offsets,
                                              int64_t heads, double eps, at::ScalarType dtype) {
  check(any_x, weight, row_offsets, heads);
  const Tensor x = with_dense_rows(any_x);
  const int64_t N = x.size(0), C = x.size(1);
  const Tensor y = at::empty({N, C}, x.options().dtype(dtype));
  const Tensor saved = at::empty({N, heads, 2}, core_options(x));
  by_stored_types(x, dtype, [&](auto s, auto r) {
    using S = decltype(s);
    using T = ComputeType<S>;
    const auto blocks = row_blocks(row_offsets, kRows);
    for_each_task(blocks.size(), [&](int64_t task) {
      const auto [group, begin, end] = blocks[task];
      const T* own = data<T>(weight) + group * C;
      for (int64_t n = begin; n < end; ++n)
        normalise_row(data<S>(x) + n * x.stride(0), own, heads, C / heads, eps, data<decltype(r)>(y) + n * C,
                      data<Statistics<T>>(saved) + n * heads);
    });
  });
  return {y, saved};
}

// Adds the row to dw; `scratch` holds the gradient of one normalised head.
template <class S, class R, class T = ComputeType<S>>
void normalise_row_backward(const R* dy, const S* x, const T* weight, const Statistics<T>* of, int64_t heads,
                            int64_t size, T* scratch, S* dx, T* dweight) {
  for (int64_t head = 0; head < heads; ++head, dy += size, x += size, weight += size, dx += size, dweight += size) {
    const auto [mean, rstd] = of[head];
    Vector<T> total{}, total_with_y{};
    for_each_vector<T>(size, [&](int64_t c, auto part) {
      const Vector<T> y = (load(x + c, part) - mean) * rstd, gradient = load(dy + c, part);
      store(dweight + c, load(dweight + c, part) + gradient * y, part);
      const Vector<T> of_y = gradient * load(weight + c, part);
      store(scratch + c, of_y, part);
      total += of_y;
      total_with_y += of_y * y;
    });
    statistics_gradient(x, scratch, of[head], sum(total), sum(total_with_y), size, dx);
  }
}

// dx [N, C] and dw [E, C].
std::tuple<Tensor, Tensor> stacked_layer_norm_backward(const Tensor& any_dy, const Tensor& any_x, const Tensor& weight,
                                                       const Tensor& saved, at::IntArrayRef row_offsets,
                                                       int64_t heads) {
  check(any_x, weight, row_offsets, heads);
  const Tensor x = with_dense_rows(any_x), dy = with_dense_rows(any_dy);
  const int64_t N = x.size(0), C = x.size(1), size = C / heads;
  const Tensor dx = at::empty({N, C}, x.options());
  const auto blocks = row_blocks(row_offsets, kRows);
  const Tensor of_block = at::zeros({int64_t(blocks.size()), C}, weight.options());
  Tensor dweight;
  by_stored_types(x, dy.scalar_type(), [&](auto s, auto r) {
    using S = decltype(s);
    using R = decltype(r);
    using T = ComputeType<S>;
    for_each_task(blocks.size(), [&](int64_t task) {
      const auto [group, begin, end] = blocks[task];
      std::vector<T> scratch(size);
      for (int64_t n = begin; n < end; ++n)
        normalise_row_backward(data<R>(dy) + n * dy.stride(0), data<S>(x) + n * x.stride(0),
                               data<T>(weight) + group * C, data<Statistics<T>>(saved) + n * heads, heads, size,
                               scratch.data(), data<S>(dx) + n * C, data<T>(of_block) + task * C);
    });
    dweight = sum_of_blocks<T>(blocks, of_block, weight.size(0));
  });
  return {dx, dweight};
}

}  // namespace

// The schemas stand in norm.py.
TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("stacked_layer_norm", &stacked_layer_norm);
  m.impl("stacked_layer_norm_backward", &stacked_layer_norm_backward);
}

}  // namespace moxe

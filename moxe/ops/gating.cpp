// What gates an inner product: SwiGLU's half of a feed-forward block, and the end of an mLSTM block.
//
//     gated_silu:    y = SiLU(a) b                               for rows [a, b]
//     mlstm_output:  y = (norm(h) w_e + skip_e s) SiLU(g)        norm over each head, s the convolved branch
//
// Legend: N rows, F width, C channels, H heads of C / H channels, E groups.
//
// A task is a block of rows and a row is finished before the next, so every input is read from memory once and every
// result is written once; SiLU(g) and the norm are recomputed in the backward pass, which costs less than reading them.
#include "norm.h"

#include "cpu/tensor.h"

namespace moxe {
namespace {

constexpr int64_t kRows = 64;

// [N, F] from [N, 2 F].
Tensor gated_silu(const Tensor& any_x) {
  TORCH_CHECK(any_x.dim() == 2 && any_x.size(1) % 2 == 0, "x must be [N, 2 F]");
  const Tensor x = with_dense_rows(any_x);
  const int64_t N = x.size(0), F = x.size(1) / 2;
  const Tensor y = at::empty({N, F}, x.options());
  by_stored_type(x, [&](auto s) {
    using S = decltype(s);
    const auto blocks = row_blocks({0, N}, kRows);
    for_each_task(blocks.size(), [&](int64_t task) {
      for (int64_t n = blocks[task].begin; n < blocks[task].end; ++n) {
        const S *a = data<S>(x) + n * x.stride(0), *b = a + F;
        S* to = data<S>(y) + n * F;
        for_each_vector<ComputeType<S>>(
            F, [&](int64_t c, auto part) { store(to + c, silu(load(a + c, part)) * load(b + c, part), part); });
      }
    });
  });
  return y;
}

// [N, 2 F]: dy b dSiLU(a) and dy SiLU(a).
Tensor gated_silu_backward(const Tensor& any_dy, const Tensor& any_x) {
  const Tensor x = with_dense_rows(any_x), dy = with_dense_rows(any_dy);
  const int64_t N = x.size(0), F = x.size(1) / 2;
  TORCH_CHECK(dy.size(0) == N && dy.size(1) == F && dy.dtype() == x.dtype(), "dy must be [N, F], like x");
  const Tensor dx = at::empty({N, 2 * F}, x.options());
  by_stored_type(x, [&](auto s) {
    using S = decltype(s);
    const auto blocks = row_blocks({0, N}, kRows);
    for_each_task(blocks.size(), [&](int64_t task) {
      for (int64_t n = blocks[task].begin; n < blocks[task].end; ++n) {
        const S *a = data<S>(x) + n * x.stride(0), *b = a + F, *gradient = data<S>(dy) + n * dy.stride(0);
        S *da = data<S>(dx) + n * 2 * F, *db = da + F;
        for_each_vector<ComputeType<S>>(F, [&](int64_t c, auto part) {
          const auto of = silu_and_slope(load(a + c, part));
          const auto g = load(gradient + c, part);
          store(da + c, g * load(b + c, part) * of.slope, part);
          store(db + c, g * of.value, part);
        });
      }
    });
  });
  return dx;
}

// The parameters of a group: the scale of its norm and the weight of its skip connection, [C] each.
template <class T>
struct Parameters {
  T *norm, *skip;
};

template <class S, class R, class T = ComputeType<S>>
void output_row(const S* h, const S* convolved, const S* gate, Parameters<const T> of, int64_t heads, int64_t size,
                double eps, R* y, Statistics<T>* saved) {
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t first = head * size;
    saved[head] = statistics(h + first, size, T(eps));
    const auto [mean, rstd] = saved[head];
    for_each_vector<T>(size, [&](int64_t at, auto part) {
      const int64_t c = first + at;
      const Vector<T> normed = (load(h + c, part) - mean) * rstd * load(of.norm + c, part);
      const Vector<T> mixed = normed + load(of.skip + c, part) * load(convolved + c, part);
      store(y + c, mixed * silu(load(gate + c, part)), part);
    });
  }
}

void check(const Tensor& h, const Tensor& convolved, const Tensor& gate, const Tensor& norm_weight, const Tensor& skip,
           at::IntArrayRef row_offsets, int64_t heads) {
  TORCH_CHECK(h.dim() == 2 && h.sizes() == convolved.sizes() && h.sizes() == gate.sizes() && h.size(1) % heads == 0 &&
                  row_offsets.back() == h.size(0),
              "h, convolved and gate must be [N, C] and row_offsets end at N");
  TORCH_CHECK(h.dtype() == convolved.dtype() && h.dtype() == gate.dtype(), "h, convolved and gate must agree in dtype");
  for (const Tensor& parameter : {norm_weight, skip})
    TORCH_CHECK(parameter.dim() == 2 && parameter.size(0) + 1 == int64_t(row_offsets.size()) &&
                    parameter.size(1) == h.size(1) && parameter.is_contiguous() &&
                    parameter.dtype() == core_options(h).dtype(),
                "norm_weight and skip must be dense [E, C], in ", core_options(h).dtype());
}

// y [N, C] in `dtype`, and mean and rstd [N, H, 2] for the backward pass.
std::tuple<Tensor, Tensor> mlstm_output(const Tensor& any_h, const Tensor& any_convolved, const Tensor& any_gate,
                                        const Tensor& norm_weight, const Tensor& skip, at::IntArrayRef row_offsets,
                                        int64_t heads, double eps, at::ScalarType dtype) {
  check(any_h, any_convolved, any_gate, norm_weight, skip, row_offsets, heads);
  const Tensor h = with_dense_rows(any_h), convolved = with_dense_rows(any_convolved);
  const Tensor gate = with_dense_rows(any_gate);
  const int64_t N = h.size(0), C = h.size(1);
  const Tensor y = at::empty({N, C}, h.options().dtype(dtype));
  const Tensor saved = at::empty({N, heads, 2}, core_options(h));
  by_stored_types(h, dtype, [&](auto s, auto r) {
    using S = decltype(s);
    using T = ComputeType<S>;
    const auto blocks = row_blocks(row_offsets, kRows);
    for_each_task(blocks.size(), [&](int64_t task) {
      const auto [group, begin, end] = blocks[task];
      const Parameters<const T> own{data<T>(norm_weight) + group * C, data<T>(skip) + group * C};
      for (int64_t n = begin; n < end; ++n)
        output_row(data<S>(h) + n * h.stride(0), data<S>(convolved) + n * convolved.stride(0),
                   data<S>(gate) + n * gate.stride(0), own, heads, C / heads, eps, data<decltype(r)>(y) + n * C,
                   data<Statistics<T>>(saved) + n * heads);
    });
  });
  return {y, saved};
}

// Adds the row to the gradients of the parameters; `scratch` holds the gradient of one normalised head.
template <class S, class R, class T = ComputeType<S>>
void output_row_backward(const R* dy, const S* h, const S* convolved, const S* gate, Parameters<const T> of,
                         const Statistics<T>* saved, int64_t heads, int64_t size, T* scratch, S* dh, S* dconvolved,
                         S* dgate, Parameters<T> gradients) {
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t first = head * size;
    const auto [mean, rstd] = saved[head];
    Vector<T> total{}, total_with_normed{};
    for_each_vector<T>(size, [&](int64_t at, auto part) {
      const int64_t c = first + at;
      const Vector<T> normed = (load(h + c, part) - mean) * rstd, s = load(convolved + c, part);
      const Vector<T> weight = load(of.norm + c, part), skip = load(of.skip + c, part), gradient = load(dy + c, part);
      const auto gated = silu_and_slope(load(gate + c, part));
      store(dgate + c, gradient * (normed * weight + skip * s) * gated.slope, part);
      const Vector<T> of_mixed = gradient * gated.value;
      store(dconvolved + c, of_mixed * skip, part);
      store(gradients.skip + c, load(gradients.skip + c, part) + of_mixed * s, part);
      store(gradients.norm + c, load(gradients.norm + c, part) + of_mixed * normed, part);
      const Vector<T> of_normed = of_mixed * weight;
      store(scratch + at, of_normed, part);
      total += of_normed;
      total_with_normed += of_normed * normed;
    });
    statistics_gradient(h + first, scratch, saved[head], sum(total), sum(total_with_normed), size, dh + first);
  }
}

// The gradients of h, convolved and gate [N, C], and of norm_weight and skip [E, C].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_output_backward(
    const Tensor& any_dy, const Tensor& any_h, const Tensor& any_convolved, const Tensor& any_gate,
    const Tensor& norm_weight, const Tensor& skip, const Tensor& saved, at::IntArrayRef row_offsets, int64_t heads) {
  check(any_h, any_convolved, any_gate, norm_weight, skip, row_offsets, heads);
  const Tensor dy = with_dense_rows(any_dy), h = with_dense_rows(any_h);
  const Tensor convolved = with_dense_rows(any_convolved), gate = with_dense_rows(any_gate);
  const int64_t N = h.size(0), C = h.size(1), size = C / heads, groups = skip.size(0);
  const Tensor dh = at::empty({N, C}, h.options()), dconvolved = at::empty({N, C}, h.options());
  const Tensor dgate = at::empty({N, C}, h.options());
  const auto blocks = row_blocks(row_offsets, kRows);
  const Tensor norm_of_block = at::zeros({int64_t(blocks.size()), C}, skip.options());
  const Tensor skip_of_block = at::zeros({int64_t(blocks.size()), C}, skip.options());
  Tensor dnorm_weight, dskip;
  by_stored_types(h, dy.scalar_type(), [&](auto s, auto r) {
    using S = decltype(s);
    using R = decltype(r);
    using T = ComputeType<S>;
    for_each_task(blocks.size(), [&](int64_t task) {
      const auto [group, begin, end] = blocks[task];
      const Parameters<const T> own{data<T>(norm_weight) + group * C, data<T>(skip) + group * C};
      const Parameters<T> gradients{data<T>(norm_of_block) + task * C, data<T>(skip_of_block) + task * C};
      std::vector<T> scratch(size);
      for (int64_t n = begin; n < end; ++n)
        output_row_backward(data<R>(dy) + n * dy.stride(0), data<S>(h) + n * h.stride(0),
                            data<S>(convolved) + n * convolved.stride(0), data<S>(gate) + n * gate.stride(0), own,
                            data<Statistics<T>>(saved) + n * heads, heads, size, scratch.data(), data<S>(dh) + n * C,
                            data<S>(dconvolved) + n * C, data<S>(dgate) + n * C, gradients);
    });
    dnorm_weight = sum_of_blocks<T>(blocks, norm_of_block, groups);
    dskip = sum_of_blocks<T>(blocks, skip_of_block, groups);
  });
  return {dh, dconvolved, dgate, dnorm_weight, dskip};
}

}  // namespace

// The schemas stand in gating.py.
TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("gated_silu", &gated_silu);
  m.impl("gated_silu_backward", &gated_silu_backward);
  m.impl("mlstm_output", &mlstm_output);
  m.impl("mlstm_output_backward", &mlstm_output_backward);
}

}  // namespace moxe

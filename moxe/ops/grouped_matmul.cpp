// Full products of packed rows with one weight set a group; `cpu/matmul.h` says how they are computed.
//
// Legend: N rows, E groups, I inputs, O outputs.
//
//     y[n] = x[n] W[e]^T  (or x[n] W[e], transposed)        total[e] (+)= sum_n dy[n]^T x[n]
//
// Rows may be stored as bfloat16: then the weights are rounded to it as they are packed, and the sums over rows, the
// gradients of the weights, stay in float32. All groups go through one parallel loop, so a group's size hardly matters.

#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace moxe {
namespace {

// Rows (or outputs, where a sum runs over rows) that one task computes, and terms added up at a time.
constexpr int64_t kRowsOfTask = 120, kOutputsOfTask = 48, kTerms = 512;

bool any_rows(at::IntArrayRef row_offsets, int64_t e) { return row_offsets[e] < row_offsets[e + 1]; }

int64_t panels_for(int64_t columns, int64_t panel) { return (columns + panel - 1) / panel; }

template <class S>
Tensor empty_elements(const Tensor& like, int64_t count) {
  return at::empty({count * static_cast<int64_t>(sizeof(Element<S>))}, like.options().dtype(at::kByte));
}

template <class S>
void check_rows(const Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1), "the numbers of a row must lie side by side");
  if constexpr (kNumbersOfElement<S> > 1)
    TORCH_CHECK(x.size(1) % 2 == 0 && x.stride(0) % 2 == 0, "rows of bfloat16 must have an even length");
}

// Every group's weights as panels, [E, panels, terms in elements, kPanel].
template <class S, class T = ComputeType<S>>
Tensor packed_weights(const Tensor& weight, at::IntArrayRef row_offsets, bool transposed) {
  const int64_t groups = weight.size(0), O = weight.size(1), I = weight.size(2);
  const int64_t columns = transposed ? I : O, K = transposed ? O : I;
  const int64_t panels = panels_for(columns, kPanel<T>), of_panel = elements_for<S>(K) * kPanel<T>;
  const Tensor packed = empty_elements<S>(weight, groups * panels * of_panel);
  for_each_task(groups * panels, [&](int64_t task) {
    const int64_t e = task / panels, first = task % panels * kPanel<T>;
    if (!any_rows(row_offsets, e)) return;
    const int64_t own = std::min(kPanel<T>, columns - first);
    const T* from = data<const T>(weight) + e * O * I;
    Element<S>* to = data<Element<S>>(packed) + task * of_panel;
    if (transposed) {
      pack_rows<S>(K, own, from + first, I, kPanel<T>, to);
    } else {
      pack_columns<S>(K, own, from + first * I, I, kPanel<T>, to);
    }
  });
  return packed;
}

template <class S, class T = ComputeType<S>>
void matmul_of(const Tensor& x, const Tensor& weight, at::IntArrayRef row_offsets, bool transposed, const Tensor& y) {
  check_rows<S>(x);
  const int64_t K = elements_for<S>(x.size(1)), columns = y.size(1), ld = x.stride(0) / kNumbersOfElement<S>;
  const int64_t panels = panels_for(columns, kPanel<T>), of_panel = K * kPanel<T>;
  const Tensor packed = packed_weights<S>(weight, row_offsets, transposed);
  const auto blocks = row_blocks(row_offsets, kRowsOfTask);
  for_each_task(blocks.size(), [&](int64_t task) {
    const auto& [e, begin, end] = blocks[task];
    const Element<S>* const rows = data<const Element<S>>(x) + begin * ld;
    for (int64_t p = 0; p < panels; ++p)
      panel_product<T, false>(end - begin, K, rows, ld, 1, data<const Element<S>>(packed) + (e * panels + p) * of_panel,
                              std::min(kPanel<T>, columns - p * kPanel<T>),
                              data<S>(y) + begin * columns + p * kPanel<T>, columns);
  });
}

Tensor grouped_matmul(const Tensor& x, const Tensor& weight, at::IntArrayRef row_offsets, bool transposed) {
  TORCH_CHECK(weight.is_contiguous() && weight.dtype() == core_options(x).dtype(),
              "weight must be contiguous and of the type that x is computed in");
  Tensor y = at::empty({x.size(0), weight.size(transposed ? 2 : 1)}, x.options());
  by_stored_type(x, [&](auto stored) { matmul_of<decltype(stored)>(x, weight, row_offsets, transposed, y); });
  return y;
}

// Rows in blocks of kTerms, each a run of whole elements of one group.
std::vector<RowBlock> blocks_of_terms(at::IntArrayRef row_offsets) {
  static_assert(kTerms % 2 == 0);
  return row_blocks(row_offsets, kTerms);
}

template <class S, class T = ComputeType<S>>
void outer_of(const Tensor& dy, const Tensor& x, at::IntArrayRef row_offsets, const Tensor& total, bool add) {
  const int64_t groups = total.size(0), O = total.size(1), I = total.size(2);
  const int64_t panels = panels_for(I, kPanel<T>), of_block = elements_for<S>(kTerms) * kPanel<T>;
  const auto blocks = blocks_of_terms(row_offsets);
  const Tensor packed = empty_elements<S>(x, static_cast<int64_t>(blocks.size()) * panels * of_block);
  const auto panel_of = [&](int64_t block, int64_t p) {
    return data<Element<S>>(packed) + (block * panels + p) * of_block;
  };
  for_each_task(blocks.size() * panels, [&](int64_t task) {
    const auto& [e, begin, end] = blocks[task / panels];
    const int64_t p = task % panels, first = p * kPanel<T>;
    pack_rows<S>(end - begin, std::min(kPanel<T>, I - first), data<const S>(x) + begin * x.stride(0) + first,
                 x.stride(0), kPanel<T>, panel_of(task / panels, p));
  });
  const int64_t of_group = (O + kOutputsOfTask - 1) / kOutputsOfTask;
  for_each_task(groups * of_group, [&](int64_t task) {
    const int64_t e = task / of_group, first = task % of_group * kOutputsOfTask;
    const int64_t outputs = std::min(kOutputsOfTask, O - first);
    T* const to = data<T>(total) + (e * O + first) * I;
    if (!any_rows(row_offsets, e)) {
      if (!add) std::fill_n(to, outputs * I, T(0));
      return;
    }
    Scratch scratch(Scratch::bytes_of<Element<S>>(elements_for<S>(kTerms) * kOutputsOfTask));
    auto* const columns = scratch.take<Element<S>>(elements_for<S>(kTerms) * kOutputsOfTask);
    for (size_t b = 0; b < blocks.size(); ++b) {
      const auto& [group, begin, end] = blocks[b];
      if (group != e) continue;
      const int64_t K = elements_for<S>(end - begin);
      pack_rows<S>(end - begin, outputs, data<const S>(dy) + begin * dy.stride(0) + first, dy.stride(0),
                   kOutputsOfTask, columns);
      const auto product = add || begin > row_offsets[e] ? panel_product<T, true, Element<S>, T>
                                                         : panel_product<T, false, Element<S>, T>;
      for (int64_t p = 0; p < panels; ++p)
        product(outputs, K, columns, 1, kOutputsOfTask, panel_of(b, p), std::min(kPanel<T>, I - p * kPanel<T>),
                to + p * kPanel<T>, I);
    }
  });
}

// total [E, O, I] (+)= the sum over each group's rows; overwritten unless `add`.
void grouped_outer_(const Tensor& dy, const Tensor& x, at::IntArrayRef row_offsets, Tensor total, bool add) {
  TORCH_CHECK(dy.dtype() == x.dtype() && dy.size(0) == x.size(0), "dy and x must be stored alike, row by row");
  TORCH_CHECK(dy.stride(1) == 1 && x.stride(1) == 1, "the numbers of a row must lie side by side");
  TORCH_CHECK(total.is_contiguous() && total.dtype() == core_options(x).dtype(),
              "total must be contiguous and of the type that x is computed in");
  by_stored_type(x, [&](auto stored) { outer_of<decltype(stored)>(dy, x, row_offsets, total, add); });
}

// Whether rows of a type go through these products rather than torch's, which is decided by the processor alone, so that
// a run on one machine always computes the same. Float: torch's library takes a slow path on AMD. bfloat16: where pairs
// are multiplied by one instruction, but not where a matrix unit does better still.
bool has_fast_matmul(at::ScalarType stored) {
#if defined(__x86_64__)
  if (stored == at::kFloat || stored == at::kDouble) return __builtin_cpu_is("amd") && kVectorBytes >= 32;
#endif
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if (stored == at::kBFloat16) return true;
#endif
  return false;
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("grouped_matmul", &grouped_matmul);
  m.impl("grouped_outer_", &grouped_outer_);
}

TORCH_LIBRARY_IMPL(moxe, CompositeExplicitAutograd, m) {
  m.impl("has_fast_matmul", &has_fast_matmul);
}

}  // namespace moxe

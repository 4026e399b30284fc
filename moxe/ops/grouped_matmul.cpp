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

// Rows and panels (or outputs, where a sum runs over rows) that one task computes, and terms added up at a time.
constexpr int64_t kRowsOfTask = 120, kPanelsOfTask = 16, kOutputsOfTask = 48, kTerms = 512;
static_assert(kTerms % 2 == 0, "a block of terms must be whole pairs");

bool any_rows(at::IntArrayRef row_offsets, int64_t e) { return row_offsets[e] < row_offsets[e + 1]; }

int64_t parts_of(int64_t count, int64_t part) { return (count + part - 1) / part; }

template <class S>
Tensor empty_elements(std::initializer_list<int64_t> sizes, int64_t of_panel) {
  std::vector<int64_t> bytes(sizes);
  bytes.push_back(of_panel * static_cast<int64_t>(sizeof(Element<S>)));
  return at::empty(bytes, at::kByte);
}

// Rows whose numbers lie side by side and, if they are read as pairs, begin where a pair may.
template <class S>
Tensor as_rows_of_elements(const Tensor& x) {
  constexpr int64_t kNumbers = kNumbersOfElement<S>;
  TORCH_CHECK(x.dim() == 2 && x.size(1) % kNumbers == 0, "rows of bfloat16 must have an even length");
  const bool dense = x.numel() == 0 || x.size(1) == 1 || x.stride(1) == 1;
  const bool whole = x.size(0) <= 1 || x.stride(0) % kNumbers == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % sizeof(Element<S>) == 0;
  return dense && whole && aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}

// Every group's weights, stored as W, as panels; those of a group without rows are left out.
template <class S, class W, class T = ComputeType<S>>
Tensor pack(const Tensor& weight, at::IntArrayRef row_offsets, bool transposed) {
  const int64_t groups = weight.size(0), O = weight.size(1), I = weight.size(2);
  const int64_t columns = transposed ? I : O, K = transposed ? O : I;
  const int64_t panels = parts_of(columns, kPanel<T>), of_panel = elements_for<S>(K) * kPanel<T>;
  const Tensor packed = empty_elements<S>({groups, panels}, of_panel);
  for_each_task(groups * panels, [&](int64_t task) {
    const int64_t e = task / panels, first = task % panels * kPanel<T>;
    if (!any_rows(row_offsets, e)) return;
    const int64_t own = std::min(kPanel<T>, columns - first);
    const W* from = data<const W>(weight) + e * O * I;
    Element<S>* to = data<Element<S>>(packed) + task * of_panel;
    if (transposed) {
      pack_rows<S>(K, own, from + first, I, kPanel<T>, to);
    } else {
      pack_columns<S>(K, own, from + first * I, I, kPanel<T>, to);
    }
  });
  return packed;
}

// weight [E, O, I] as panels [E, panels, bytes] for products with rows stored as `stored`.
Tensor pack_matrices(const Tensor& weight, at::ScalarType stored, at::IntArrayRef row_offsets, bool transposed) {
  TORCH_CHECK(weight.dim() == 3 && weight.is_contiguous(), "weight must be contiguous [E, O, I]");
  TORCH_CHECK(weight.size(0) == static_cast<int64_t>(row_offsets.size()) - 1, "weight must have a matrix a group");
  const auto type = weight.scalar_type();
  if (stored == at::kBFloat16) {
    if (type == at::kBFloat16) return pack<BFloat16, BFloat16>(weight, row_offsets, transposed);
    TORCH_CHECK(type == at::kFloat, "weight must be bfloat16 or float32");
    return pack<BFloat16, float>(weight, row_offsets, transposed);
  }
  TORCH_CHECK(type == stored && (stored == at::kFloat || stored == at::kDouble), "weight must be stored as the rows");
  return stored == at::kFloat ? pack<float, float>(weight, row_offsets, transposed)
                              : pack<double, double>(weight, row_offsets, transposed);
}

template <class S, class T = ComputeType<S>>
void multiply(const Tensor& x, const Tensor& packed, at::IntArrayRef row_offsets, const Tensor& y) {
  const Tensor rows = as_rows_of_elements<S>(x);
  const int64_t K = elements_for<S>(x.size(1)), columns = y.size(1), ld = rows.stride(0) / kNumbersOfElement<S>;
  const int64_t panels = parts_of(columns, kPanel<T>), of_panel = K * kPanel<T>;
  TORCH_CHECK(packed.size(1) == panels && packed.size(2) == of_panel * static_cast<int64_t>(sizeof(Element<S>)),
              "the matrices were packed for other rows or columns");
  const auto blocks = row_blocks(row_offsets, kRowsOfTask);
  const int64_t runs = parts_of(panels, kPanelsOfTask);
  for_each_task(blocks.size() * runs, [&](int64_t task) {
    const auto& [e, begin, end] = blocks[task / runs];
    const int64_t first = task % runs * kPanelsOfTask;
    const Element<S>* const from = data<const Element<S>>(rows) + begin * ld;
    for (int64_t p = first; p < std::min(first + kPanelsOfTask, panels); ++p)
      panel_product<T, false>(end - begin, K, from, ld, 1, data<const Element<S>>(packed) + (e * panels + p) * of_panel,
                              std::min(kPanel<T>, columns - p * kPanel<T>),
                              data<S>(y) + begin * columns + p * kPanel<T>, columns);
  });
}

// y [N, columns] of rows x and packed matrices.
Tensor multiply_packed(const Tensor& x, const Tensor& packed, at::IntArrayRef row_offsets, int64_t columns) {
  TORCH_CHECK(row_offsets.back() == x.size(0), "there must be as many rows as row_offsets say");
  Tensor y = at::empty({x.size(0), columns}, x.options());
  by_stored_type(x, [&](auto stored) { multiply<decltype(stored)>(x, packed, row_offsets, y); });
  return y;
}

template <class S, class T = ComputeType<S>>
void outer_of(const Tensor& dy, const Tensor& x, at::IntArrayRef row_offsets, const Tensor& total, bool add) {
  const int64_t groups = total.size(0), O = total.size(1), I = total.size(2);
  const int64_t panels = parts_of(I, kPanel<T>), of_block = elements_for<S>(kTerms) * kPanel<T>;
  const auto blocks = row_blocks(row_offsets, kTerms);
  const Tensor packed = empty_elements<S>({static_cast<int64_t>(blocks.size()), panels}, of_block);
  const auto panel_of = [&](int64_t block, int64_t p) {
    return data<Element<S>>(packed) + (block * panels + p) * of_block;
  };
  for_each_task(blocks.size() * panels, [&](int64_t task) {
    const auto& [e, begin, end] = blocks[task / panels];
    const int64_t p = task % panels, first = p * kPanel<T>;
    pack_rows<S>(end - begin, std::min(kPanel<T>, I - first), data<const S>(x) + begin * x.stride(0) + first,
                 x.stride(0), kPanel<T>, panel_of(task / panels, p));
  });
  const int64_t of_group = parts_of(O, kOutputsOfTask);
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
  TORCH_CHECK(dy.dtype() == x.dtype() && dy.size(0) == x.size(0) && row_offsets.back() == x.size(0),
              "dy and x must be stored alike, and have as many rows as row_offsets say");
  TORCH_CHECK(total.sizes() == at::IntArrayRef({static_cast<int64_t>(row_offsets.size()) - 1, dy.size(1), x.size(1)}),
              "total must be [E, O, I]");
  TORCH_CHECK(total.is_contiguous() && total.dtype() == core_options(x).dtype(),
              "total must be contiguous and of the type that x is computed in");
  const auto dense = [](const Tensor& rows) {
    return rows.numel() == 0 || rows.size(1) == 1 || rows.stride(1) == 1 ? rows
                                                                         : rows.clone(at::MemoryFormat::Contiguous);
  };
  by_stored_type(x, [&](auto stored) { outer_of<decltype(stored)>(dense(dy), dense(x), row_offsets, total, add); });
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

int64_t columns_of_panel(at::ScalarType stored) { return stored == at::kDouble ? kPanel<double> : kPanel<float>; }

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("pack_matrices", &pack_matrices);
  m.impl("multiply_packed", &multiply_packed);
  m.impl("grouped_outer_", &grouped_outer_);
}

TORCH_LIBRARY_IMPL(moxe, CompositeExplicitAutograd, m) {
  m.impl("has_fast_matmul", &has_fast_matmul);
  m.impl("columns_of_panel", &columns_of_panel);
}

}  // namespace moxe

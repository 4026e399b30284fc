// What the mLSTM cell reads, and its gradients: block-diagonal products of two branches, and the gates of those.
//
// Legend: N rows, E groups, C channels in blocks of kBlock, H heads; P = 2 H gates.
//
//     q, k = s W_q, s W_k      v = a W_v      gates = [q, k, v] W_g^T + b      (s the convolved branch, a the branch)
//     dq' = dq + dgates W_gq, and so for k and v;      ds = dq' W_q^T + dk' W_k^T      da = dv' W_v^T
//     dW_q = sum_n s^T dq' ...      dW_g = sum_n dgates^T [q, k, v]      db = sum_n dgates
//
// Memory is what takes time here: a few rows at a time go through everything, so each is read and written once.

#include "cpu/narrow_blocks.h"
#include "cpu/scratch.h"
#include "mlstm/gates.h"

namespace moxe {
namespace {

constexpr int64_t kRowsOfTask = 128;

template <class S>
struct Branches {
  Rows<S> convolved, branch;

  const Rows<S>& of(int source) const { return source == kSources - 1 ? branch : convolved; }
};

// Sizes of one group's parameters, and where they lie in what a task adds up: the three block-diagonal weights as
// `spread_weights` gives them, the gates' weights [P, 3 C], the gates' biases [P].
template <class T>
struct Sums {
  GateSizes gates;
  int64_t spread;

  int64_t gate_weight() const { return kSources * spread; }
  int64_t gate_bias() const { return gate_weight() + gates.weights(); }
  int64_t size() const { return gate_bias() + gates.gates(); }
};

// As the gates read them.
template <class S>
Sources<const S> as_sources(const Sources<S>& rows) {
  Sources<const S> sources;
  for (int s = 0; s < kSources; ++s) sources[s] = {rows[s].start, rows[s].stride};
  return sources;
}

template <int kBlock, class S, class T, int kRows>
void project_rows(int64_t channels, int64_t n, const Rows<const S>& x, const T* weights, const Rows<S>& y) {
  for_each_vector<T>(channels, [&](int64_t c, auto lanes) {
    Vector<T> from[kRows], to[kRows];
    load_rows(x, n, c, lanes, from);
    multiply<kBlock>(weights + c * kBlock, from, to);
    for (int r = 0; r < kRows; ++r) store(y.at(n + r) + c, to[r], lanes);
  });
}

template <int kBlock, class S, class T = ComputeType<S>>
void project(const GateSizes& sizes, at::IntArrayRef row_offsets, const Branches<const S>& x,
             const std::array<Tensor, kSources>& weights, const T* gate_weight, const T* gate_bias,
             const Sources<S>& y, const Gates<T>& gates) {
  const int64_t channels = sizes.channels, size = spread_size<T>(channels, kBlock);
  std::array<Tensor, kSources> spread;
  for (int s = 0; s < kSources; ++s) spread[s] = spread_groups<kBlock, T>(channels, weights[s], false);
  const auto pieces = row_blocks(row_offsets, kRowsOfTask);
  for_each_task(pieces.size(), [&](int64_t task) {
    const auto& [e, begin, end] = pieces[task];
    for_few_rows(begin, end, [&](int64_t n, auto rows) {
      for (int s = 0; s < kSources; ++s)
        project_rows<kBlock, S, T, rows()>(channels, n, x.of(s), data<T>(spread[s]) + e * size, y[s]);
      constexpr int kAtOnce = rows() < kTileRowsOfGates ? rows() : kTileRowsOfGates;
      for (int r = 0; r < rows(); r += kAtOnce)
        gates_of_rows<S, kAtOnce>(sizes, as_sources(y), n + r, gate_weight + e * sizes.weights(),
                                  gate_bias + e * sizes.gates(), gates);
    });
  });
}

// What a few rows' gradients of one source need beside them; weights and sums of one group.
template <class S>
struct SourceGradient {
  using T = ComputeType<S>;
  Rows<const S> y, dy;
  const T* transposed;
  const T* gate_weight;
  T* dweight;
  T* dgate_weight;
};

// A few rows of one branch: the gradients of its sources, from the cell and from the gates, go to the weights and, added
// up, to the branch.
template <int kBlock, class S, class T, int kRows, size_t kCount>
void branch_backward(const GateSizes& sizes, int64_t n, const T* dgates, const Rows<const S>& x, const Rows<S>& dx,
                     const std::array<SourceGradient<S>, kCount>& sources) {
  const int64_t gates = sizes.gates(), inputs = sizes.inputs();
  for_each_vector<T>(sizes.channels, [&](int64_t c, auto lanes) {
    Vector<T> in[kRows], total[kRows] = {};
    load_rows(x, n, c, lanes, in);
    for (const SourceGradient<S>& source : sources) {
      Vector<T> out[kRows], dout[kRows], din[kRows];
      load_rows(source.y, n, c, lanes, out);
      load_rows(source.dy, n, c, lanes, dout);
      for (int64_t p = 0; p < gates; ++p) {
        const Vector<T> w = load(source.gate_weight + p * inputs + c, lanes);
        Vector<T> dw = load(source.dgate_weight + p * inputs + c, lanes);
        for (int r = 0; r < kRows; ++r) {
          const T dgate = dgates[r * gates + p];
          dout[r] += dgate * w;
          dw += dgate * out[r];
        }
        store(source.dgate_weight + p * inputs + c, dw, lanes);
      }
      multiply<kBlock>(source.transposed + c * kBlock, dout, din);
      for (int r = 0; r < kRows; ++r) total[r] += din[r];
      add_outer<kBlock>(in, dout, source.dweight + c * kBlock);
    }
    for (int r = 0; r < kRows; ++r) store(dx.at(n + r) + c, total[r], lanes);
  });
}

template <class S>
struct Gradients {
  Gates<const ComputeType<S>> gates;
  Sources<const S> of_source;
  Branches<S> of_branch;
};

template <int kBlock, class S, class T = ComputeType<S>>
void backward_of_piece(const Sums<T>& at, const RowBlock& piece, const Gradients<S>& d, const Branches<const S>& x,
                       const Sources<const S>& y, const std::array<const T*, kSources>& transposed,
                       const T* gate_weight, T* sums) {
  const int64_t gates = at.gates.gates(), channels = at.gates.channels;
  std::fill_n(sums, at.size(), T(0));
  Scratch scratch(Scratch::bytes_of<T>(kNarrowRows * gates));
  T* const dgates = scratch.take<T>(kNarrowRows * gates);
  for_few_rows(piece.begin, piece.end, [&](int64_t n, auto rows) {
    for (int r = 0; r < rows(); ++r)
      for (int64_t p = 0; p < gates; ++p) {
        dgates[r * gates + p] = *d.gates.at(n + r, p, at.gates.heads);
        sums[at.gate_bias() + p] += dgates[r * gates + p];
      }
    const auto source = [&](int s) -> SourceGradient<S> {
      return {y[s],           d.of_source[s], transposed[s], gate_weight + s * channels, sums + s * at.spread,
              sums + at.gate_weight() + s * channels};
    };
    branch_backward<kBlock, S, T, rows(), 2>(at.gates, n, dgates, x.convolved, d.of_branch.convolved,
                                             {source(0), source(1)});
    branch_backward<kBlock, S, T, rows(), 1>(at.gates, n, dgates, x.branch, d.of_branch.branch, {source(2)});
  });
}

template <int kBlock, class S, class T = ComputeType<S>>
void project_backward(const GateSizes& sizes, at::IntArrayRef row_offsets, const Gradients<S>& d,
                      const Branches<const S>& x, const Sources<const S>& y,
                      const std::array<Tensor, kSources>& weights, const T* gate_weight,
                      const std::array<T*, kSources>& dweights, T* dgate_weight, T* dgate_bias) {
  const int64_t channels = sizes.channels, groups = weights[0].size(0);
  const Sums<T> at = {sizes, spread_size<T>(channels, kBlock)};
  std::array<Tensor, kSources> transposed;
  for (int s = 0; s < kSources; ++s) transposed[s] = spread_groups<kBlock, T>(channels, weights[s], true);
  const auto pieces = row_blocks(row_offsets, kRowsOfTask);
  const Tensor partial = at::empty({static_cast<int64_t>(pieces.size()), at.size()}, weights[0].options());
  for_each_task(pieces.size(), [&](int64_t task) {
    const int64_t e = pieces[task].group;
    std::array<const T*, kSources> own;
    for (int s = 0; s < kSources; ++s) own[s] = data<T>(transposed[s]) + e * at.spread;
    backward_of_piece<kBlock>(at, pieces[task], d, x, y, own, gate_weight + e * sizes.weights(),
                              data<T>(partial) + task * at.size());
  });
  const Tensor total = sum_of_blocks<T>(pieces, partial, groups);
  for_each_task(groups, [&](int64_t e) {
    const T* const from = data<T>(total) + e * at.size();
    for (int s = 0; s < kSources; ++s)
      gather_weights<kBlock>(channels, from + s * at.spread, dweights[s] + e * channels * kBlock);
    std::copy_n(from + at.gate_weight(), sizes.weights(), dgate_weight + e * sizes.weights());
    std::copy_n(from + at.gate_bias(), sizes.gates(), dgate_bias + e * sizes.gates());
  });
}

void check(const Tensor& convolved, const Tensor& branch, const Tensor& q_weight, const Tensor& k_weight,
           const Tensor& v_weight, const Tensor& gate_weight) {
  for (const Tensor& x : {convolved, branch}) {
    TORCH_CHECK(x.stride(1) == 1 || x.size(1) <= 1 || x.numel() == 0, "the channels of the branches must lie side by side");
    TORCH_CHECK(x.dtype() == convolved.dtype(), "the branches must be stored alike");
  }
  const auto parameters = core_options(convolved).dtype();
  for (const Tensor& w : {q_weight, k_weight, v_weight, gate_weight})
    TORCH_CHECK(w.is_contiguous() && w.dtype() == parameters, "weights must be contiguous, in ", parameters);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_projections(
    const Tensor& convolved, const Tensor& branch, const Tensor& q_weight, const Tensor& k_weight,
    const Tensor& v_weight, const Tensor& gate_weight, const Tensor& gate_bias, at::IntArrayRef row_offsets) {
  check(convolved, branch, q_weight, k_weight, v_weight, gate_weight);
  TORCH_CHECK(gate_bias.is_contiguous() && gate_bias.dtype() == gate_weight.dtype(), "gate_bias must be as gate_weight");
  const GateSizes sizes = {convolved.size(1), gate_weight.size(1) / 2};
  const auto rows = [&] { return at::empty(convolved.sizes(), convolved.options()); };
  Tensor q = rows(), k = rows(), v = rows();
  Tensor igate = at::empty({convolved.size(0), sizes.heads}, gate_weight.options());
  Tensor fgate = at::empty({convolved.size(0), sizes.heads}, gate_weight.options());
  by_stored_type(convolved, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const bool fits = by_narrow_block<T>(q_weight.size(2), [&](auto block) {
        project<block(), S>(sizes, row_offsets, {rows_of<const S>(convolved), rows_of<const S>(branch)},
                            {q_weight, k_weight, v_weight}, data<T>(gate_weight), data<T>(gate_bias),
                            {rows_of<S>(q), rows_of<S>(k), rows_of<S>(v)}, {data<T>(igate), data<T>(fgate)});
    });
    TORCH_CHECK(fits, "blocks of ", q_weight.size(2), " channels do not fit into a vector");
  });
  return {q, k, v, igate, fgate};
}

// Gradients of the branches, the three block-diagonal weights, the gates' weight and the gates' bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_projections_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& digate, const Tensor& dfgate,
    const Tensor& convolved, const Tensor& branch, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& q_weight, const Tensor& k_weight, const Tensor& v_weight, const Tensor& gate_weight,
    at::IntArrayRef row_offsets) {
  check(convolved, branch, q_weight, k_weight, v_weight, gate_weight);
  for (const Tensor& x : {dq, dk, dv, q, k, v})
    TORCH_CHECK(x.is_contiguous() && x.dtype() == convolved.dtype(), "rows must be contiguous, stored as the branches");
  for (const Tensor& x : {digate, dfgate})
    TORCH_CHECK(x.is_contiguous() && x.dtype() == gate_weight.dtype(), "gates must be contiguous, as their weight");
  const GateSizes sizes = {convolved.size(1), gate_weight.size(1) / 2};
  Tensor dconvolved = at::empty(convolved.sizes(), convolved.options());
  Tensor dbranch = at::empty(branch.sizes(), branch.options());
  const auto as = [&](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
  Tensor dq_weight = as(q_weight), dk_weight = as(k_weight), dv_weight = as(v_weight), dgate_weight = as(gate_weight);
  Tensor dgate_bias = at::empty({gate_weight.size(0), sizes.gates()}, gate_weight.options());
  by_stored_type(convolved, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const Gradients<S> d = {{data<const T>(digate), data<const T>(dfgate)},
                            {rows_of<const S>(dq), rows_of<const S>(dk), rows_of<const S>(dv)},
                            {rows_of<S>(dconvolved), rows_of<S>(dbranch)}};
    const bool fits = by_narrow_block<T>(q_weight.size(2), [&](auto block) {
        project_backward<block(), S>(sizes, row_offsets, d, {rows_of<const S>(convolved), rows_of<const S>(branch)},
                                     {rows_of<const S>(q), rows_of<const S>(k), rows_of<const S>(v)},
                                     {q_weight, k_weight, v_weight}, data<const T>(gate_weight),
                                     {data<T>(dq_weight), data<T>(dk_weight), data<T>(dv_weight)},
                                     data<T>(dgate_weight), data<T>(dgate_bias));
    });
    TORCH_CHECK(fits, "blocks of ", q_weight.size(2), " channels do not fit into a vector");
  });
  return {dconvolved, dbranch, dq_weight, dk_weight, dv_weight, dgate_weight, dgate_bias};
}

// Whether blocks of this size are known, and fit into a vector of what numbers of a type are computed in.
bool fits_in_vector(at::ScalarType stored, int64_t block) {
  const auto any = [](auto) {};
  return stored == at::kDouble ? by_narrow_block<double>(block, any) : by_narrow_block<float>(block, any);
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CompositeExplicitAutograd, m) { m.impl("fits_in_vector", &fits_in_vector); }

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("mlstm_projections", &mlstm_projections);
  m.impl("mlstm_projections_backward", &mlstm_projections_backward);
}

}  // namespace moxe

// One token of a few rows through mLSTM blocks, as in decoding: the equations are those of the block, the state changes
// in place, and each choice reads its block's weights once, as they are stored.
//
// Legend: N rows, K choices a row, E blocks, D hidden size, I inner size, H heads, Dh = I / H,
// Q diagonal blocks, T taps.
//
// Three rounds of tasks: channels of the up-projection with all that follows from them alone (convolution, q, k, v and
// their share of the gates), heads of the cell, outputs of the down-projection. No sum is shared by two tasks or rows.

#include "cpu/gemm.h"
#include "cpu/one_token.h"

namespace moxe {
namespace {

constexpr int kSources = 3;  // of the gates: q, k, v
constexpr int64_t kChannelsOfTask = 64;

struct Sizes {
  int64_t hidden, inner, heads, taps, diagonal;

  int64_t head() const { return inner / heads; }
  int64_t block() const { return inner / diagonal; }
  int64_t gates() const { return 2 * heads; }
  // Of whole diagonal blocks.
  Pieces channels() const { return {inner, std::max<int64_t>(kChannelsOfTask / block(), 1) * block()}; }
  int64_t shares() const { return kSources * channels().number(); }
};

enum Parameter {
  kNorm, kUp, kConv, kConvBias, kQuery, kKey, kValue, kGate, kGateBias, kHeadNorm, kSkip, kDown, kParameters
};
using Parameters = std::array<Tensor, kParameters>;

// What a choice needs between the rounds; each [I] but for normed [D] and the shares of the gates.
template <class T>
struct Work {
  T *normed, *branch, *gate, *convolved, *q, *k, *v, *mixed, *shares;

  Work(Scratch& scratch, const Sizes& sizes) : normed(scratch.take<T>(sizes.hidden)) {
    for (T** array : {&branch, &gate, &convolved, &q, &k, &v, &mixed}) *array = scratch.take<T>(sizes.inner);
    shares = scratch.take<T>(sizes.shares() * sizes.gates());
  }
  static int64_t bytes(const Sizes& sizes) {
    return Scratch::bytes_of<T>(sizes.hidden) + 7 * Scratch::bytes_of<T>(sizes.inner) +
           Scratch::bytes_of<T>(sizes.shares() * sizes.gates());
  }
};

// Channels of the piece: both branches, the convolution, q, k, v, and what they add to the gates.
template <class W, class S, class T = ComputeType<W>>
void project(const Sizes& sizes, const Parameters& of, int64_t block, int64_t piece, S* conv_state,
             const Work<T>& work) {
  const int64_t begin = sizes.channels().begin(piece), end = sizes.channels().end(piece), count = end - begin;
  const int64_t width = sizes.block(), gates = sizes.gates();
  for (const int weight : {kQuery, kKey, kValue})
    fetch_all(of_block<const W>(of[weight], block) + begin * width, count * width);
  const W* const up = of_block<const W>(of[kUp], block);
  matrix_vector(count, sizes.hidden, work.normed, up + begin * sizes.hidden, sizes.hidden, work.branch + begin);
  matrix_vector(count, sizes.hidden, work.normed, up + (sizes.inner + begin) * sizes.hidden, sizes.hidden,
                work.gate + begin);
  const Taps<W> taps{of_block<const W>(of[kConv], block), of_block<const W>(of[kConvBias], block), sizes.taps,
                     sizes.inner};
  convolve(taps, begin, end, work.branch, conv_state, work.convolved);

  const T* const from[] = {work.convolved, work.convolved, work.branch};
  T* const to[] = {work.q, work.k, work.v};
  for (int source = 0; source < kSources; ++source) {
    const W* const weight = of_block<const W>(of[kQuery + source], block);
    for (int64_t c = begin; c < end; c += width)
      gemm<T, false>(1, width, width, from[source] + c, width, 1, weight + c * width, width, to[source] + c, width);
    matrix_vector(gates, count, to[source] + begin, of_block<const W>(of[kGate], block) + source * sizes.inner + begin,
                  kSources * sizes.inner, work.shares + (piece * kSources + source) * gates);
  }
}

// The memory of one head: C [Dh, Dh], n [Dh] and their scale m.
template <class T>
struct Memory {
  T *c, *n, *m;
};

// h of the head, normalised, with the skip connection and gated, in `mixed`; the memory goes on by a token.
template <class W, class T = ComputeType<W>>
void run_head(const Sizes& sizes, const Parameters& of, int64_t block, int64_t head, T eps, const Memory<T>& memory,
              const Work<T>& work) {
  const int64_t size = sizes.head(), first = head * size;
  fetch_all(memory.c, size * size);
  const W* const bias = of_block<const W>(of[kGateBias], block);
  T igate = widen(bias[head]), fgate = widen(bias[sizes.heads + head]);
  for (int64_t share = 0; share < sizes.shares(); ++share) {
    igate += work.shares[share * sizes.gates() + head];
    fgate += work.shares[share * sizes.gates() + sizes.heads + head];
  }
  const T kept = log_sigmoid(fgate) + *memory.m, m = maximum(kept, igate);
  const T f = std::exp(kept - m), i = std::exp(igate - m) / std::sqrt(static_cast<T>(size));
  *memory.m = m;

  const T *q = work.q + first, *k = work.k + first, *v = work.v + first;
  T* const h = work.mixed + first;
  Vector<T> n_dot_q{};
  for_each_vector<T>(size, [&](int64_t d, auto part) {
    const Vector<T> n = f * load(memory.n + d, part) + i * load(k + d, part);
    store(memory.n + d, n, part);
    n_dot_q += n * load(q + d, part);
    store(h + d, Vector<T>{}, part);
  });
  for (int64_t key = 0; key < size; ++key) {
    T* const c = memory.c + key * size;
    const T weight = i * k[key], query = q[key];
    for_each_vector<T>(size, [&](int64_t d, auto part) {
      const Vector<T> now = f * load(c + d, part) + weight * load(v + d, part);
      store(c + d, now, part);
      store(h + d, load(h + d, part) + query * now, part);
    });
  }
  const T divisor = maximum(std::abs(sum(n_dot_q)), std::exp(-m));
  for_each_vector<T>(size, [&](int64_t d, auto part) { store(h + d, load(h + d, part) / divisor, part); });

  normalise(h, of_block<const W>(of[kHeadNorm], block) + first, size, eps, h);
  const W* const skip = of_block<const W>(of[kSkip], block) + first;
  for_each_vector<T>(size, [&](int64_t d, auto part) {
    const Vector<T> mixed = load(h + d, part) + load(skip + d, part) * load(work.convolved + first + d, part);
    store(h + d, mixed * silu(load(work.gate + first + d, part)), part);
  });
}

template <class W, class S, class T = ComputeType<W>>
void step(const Sizes& sizes, const std::vector<Choice>& choices, const Parameters& of, double eps, const Tensor& x,
          const Tensor& conv, const Tensor& c, const Tensor& n, const Tensor& m, const Tensor& out) {
  const int64_t count = static_cast<int64_t>(choices.size()), pieces = sizes.channels().number();
  // The tasks take no scratch of their own, or this thread's would be gone.
  Scratch scratch(count * Work<T>::bytes(sizes));
  std::vector<Work<T>> work;
  for (const Choice& choice : choices) {
    work.emplace_back(scratch, sizes);
    normalise(data<const T>(x) + choice.row * sizes.hidden, of_block<const W>(of[kNorm], choice.block), sizes.hidden,
              T(eps), work.back().normed);
  }
  for_each_task(count * pieces, [&](int64_t task) {
    const Choice& choice = choices[task / pieces];
    project<W>(sizes, of, choice.block, task % pieces, of_choice<S>(conv, choice), work[task / pieces]);
  });
  for_each_task(count * sizes.heads, [&](int64_t task) {
    const Choice& choice = choices[task / sizes.heads];
    const int64_t head = task % sizes.heads, size = sizes.head();
    const Memory<T> memory{of_choice<T>(c, choice) + head * size * size, of_choice<T>(n, choice) + head * size,
                           of_choice<T>(m, choice) + head};
    run_head<W>(sizes, of, choice.block, head, T(eps), memory, work[task / sizes.heads]);
  });
  add_outputs<T>(choices, out, [&](int64_t i, int64_t begin, int64_t end, T* y) {
    matrix_vector(end - begin, sizes.inner, work[i].mixed,
                  of_block<const W>(of[kDown], choices[i].block) + begin * sizes.inner, sizes.inner, y);
  });
}

void mlstm_step(const Tensor& x, const Tensor& experts, const Tensor& weights, int64_t first, const Tensor& norm,
                const Tensor& up_proj, const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& q_proj,
                const Tensor& k_proj, const Tensor& v_proj, const Tensor& gate_weight, const Tensor& gate_bias,
                const Tensor& head_norm, const Tensor& skip, const Tensor& down_proj, int64_t heads, double eps,
                const Tensor& conv, const Tensor& c, const Tensor& n, const Tensor& m, const Tensor& out) {
  const int64_t blocks = up_proj.size(0), inner = down_proj.size(2);
  const Sizes sizes{down_proj.size(1), inner, heads, conv_weight.size(2), q_proj.size(1)};
  check_rows(x, experts, out);
  check_state(conv, x, {blocks, sizes.taps - 1, inner});
  check_state(c, x, {blocks, heads, sizes.head(), sizes.head()});
  check_state(n, x, {blocks, heads, sizes.head()});
  check_state(m, x, {blocks, heads});
  for (const Tensor& state : {c, n, m}) TORCH_CHECK(state.dtype() == x.dtype(), "c, n and m must be stored as x is");
  const auto choices = choices_among(experts, weights, first, blocks);
  if (choices.empty()) return;
  const auto of = stored_alike<kParameters>({norm, up_proj, conv_weight, conv_bias, q_proj, k_proj, v_proj, gate_weight,
                                             gate_bias, head_norm, skip, down_proj},
                                            x.scalar_type());
  const int64_t hidden = sizes.hidden, taps = sizes.taps, width = sizes.block(), gates = sizes.gates();
  TORCH_CHECK(inner % heads == 0 && inner % sizes.diagonal == 0, inner, " channels can not be shared out");
  const at::DimVector projection = {blocks, sizes.diagonal, width, width}, of_channels = {blocks, inner};
  check_parameters<kParameters>(of, {{{blocks, hidden},
                                      {blocks, 2 * inner, hidden},
                                      {blocks, inner, taps},
                                      of_channels,
                                      projection,
                                      projection,
                                      projection,
                                      {blocks, gates, kSources * inner},
                                      {blocks, gates},
                                      of_channels,
                                      of_channels,
                                      {blocks, hidden, inner}}});
  TORCH_CHECK((of[kUp].scalar_type() == at::kDouble) == (x.scalar_type() == at::kDouble),
              "x must be float64 where parameters are, and only there");
  by_stored_types(of[kUp], conv.scalar_type(), [&](auto w, auto s) {
    step<decltype(w), decltype(s)>(sizes, choices, of, eps, x, conv, c, n, m, out);
  });
  mark_as_changed({conv, c, n, m, out});
}

}  // namespace

// The schema stands in step.py.
TORCH_LIBRARY_IMPL(moxe, CPU, m) { m.impl("mlstm_step_", &mlstm_step); }

}  // namespace moxe

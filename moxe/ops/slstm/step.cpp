// One token of a few rows through sLSTM blocks, as in decoding: the equations are those of the block, the state changes
// in place, and each choice reads its block's weights once, as they are stored.
//
// Legend: N rows, K choices a row, E blocks, D hidden size, H heads, Dh = D / H, T taps, F width
// of the feed-forward part.
//
// Three rounds of tasks: heads, from the convolution to the normalised output of the cell; pairs of outputs of the
// feed-forward part's up-projection; outputs of its down-projection. No sum is shared by two tasks or rows.

#include "cpu/gemm.h"
#include "cpu/one_token.h"
#include "slstm/cell.h"

namespace moxe {
namespace {

constexpr int64_t kGates = 4;

struct Sizes {
  int64_t hidden, heads, taps, width;

  int64_t head() const { return hidden / heads; }
  Pieces pairs() const { return {width, kOutputsOfStep}; }
};

enum Parameter {
  kNorm, kConv, kConvBias, kIF, kZO, kRecurrent, kGateBias, kHeadNorm, kFeedForwardNorm, kUp, kDown, kParameters
};
using Parameters = std::array<Tensor, kParameters>;

// What a choice needs between the rounds; each [D] but for gates [H, 4, Dh] and the feed-forward part's [F].
template <class T>
struct Work {
  T *normed, *convolved, *mixed, *residual, *gates, *inner;

  Work(Scratch& scratch, const Sizes& sizes) {
    for (T** array : {&normed, &convolved, &mixed, &residual}) *array = scratch.take<T>(sizes.hidden);
    gates = scratch.take<T>(kGates * sizes.hidden);
    inner = scratch.take<T>(sizes.width);
  }
  static int64_t bytes(const Sizes& sizes) {
    return 4 * Scratch::bytes_of<T>(sizes.hidden) + Scratch::bytes_of<T>(kGates * sizes.hidden) +
           Scratch::bytes_of<T>(sizes.width);
  }
};

// The memory of one head, each [Dh].
template <class T>
struct Memory {
  T *c, *n, *m, *h;
};

// The head's output, normalised, in `mixed`; the memory goes on by a token.
template <class W, class S, class T = ComputeType<W>>
void run_head(const Sizes& sizes, const Parameters& of, int64_t block, int64_t head, T eps, S* conv_state,
              const Memory<T>& memory, const Work<T>& work) {
  const int64_t size = sizes.head(), first = head * size;
  const W* const if_weight = of_block<const W>(of[kIF], block) + first * 2 * size;
  const W* const zo_weight = of_block<const W>(of[kZO], block) + first * 2 * size;
  const W* const recurrent = of_block<const W>(of[kRecurrent], block) + first * kGates * size;
  fetch_all(if_weight, 2 * size * size);
  fetch_all(zo_weight, 2 * size * size);
  fetch_all(recurrent, kGates * size * size);
  const Taps<W> taps{of_block<const W>(of[kConv], block), of_block<const W>(of[kConvBias], block), sizes.taps,
                     sizes.hidden};
  convolve(taps, first, first + size, work.normed, conv_state, work.convolved);

  T* const gates = work.gates + kGates * first;
  const W* const bias = of_block<const W>(of[kGateBias], block) + kGates * first;
  for (int64_t g = 0; g < kGates * size; ++g) gates[g] = widen(bias[g]);
  const auto add_product = [&](const T* from, const W* weight, int64_t outputs, T* to) {
    gemm<T, true>(1, outputs, size, from, size, 1, weight, outputs, to, outputs);
  };
  add_product(work.convolved + first, if_weight, 2 * size, gates);
  add_product(work.normed + first, zo_weight, 2 * size, gates + 2 * size);
  add_product(memory.h, recurrent, kGates * size, gates);

  T* const mixed = work.mixed + first;
  for_each_vector<T>(size, [&](int64_t d, auto part) {
    const auto gate = [&](int64_t g) { return load(gates + g * size + d, part); };
    const auto now = advance_cell(gate(0), gate(1), gate(2), gate(3), load(memory.c + d, part),
                                  load(memory.n + d, part), load(memory.m + d, part));
    store(memory.c + d, now.c, part);
    store(memory.n + d, now.n, part);
    store(memory.m + d, now.m, part);
    store(memory.h + d, now.h, part);
    store(mixed + d, now.h, part);
  });
  normalise(mixed, of_block<const W>(of[kHeadNorm], block) + first, size, eps, mixed);
}

template <class W, class S, class T = ComputeType<W>>
void step(const Sizes& sizes, const std::vector<Choice>& choices, const Parameters& of, double eps, const Tensor& x,
          const Tensor& conv, const Tensor& c, const Tensor& n, const Tensor& m, const Tensor& h, const Tensor& out) {
  const int64_t count = static_cast<int64_t>(choices.size()), hidden = sizes.hidden;
  // The tasks take no scratch of their own, or this thread's would be gone.
  Scratch scratch(count * Work<T>::bytes(sizes));
  std::vector<Work<T>> work;
  for (const Choice& choice : choices) {
    work.emplace_back(scratch, sizes);
    normalise(data<const T>(x) + choice.row * hidden, of_block<const W>(of[kNorm], choice.block), hidden, T(eps),
              work.back().normed);
  }
  for_each_task(count * sizes.heads, [&](int64_t task) {
    const Choice& choice = choices[task / sizes.heads];
    const int64_t head = task % sizes.heads, first = head * sizes.head();
    const Memory<T> memory{of_choice<T>(c, choice) + first, of_choice<T>(n, choice) + first,
                           of_choice<T>(m, choice) + first, of_choice<T>(h, choice) + first};
    run_head<W>(sizes, of, choice.block, head, T(eps), of_choice<S>(conv, choice), memory, work[task / sizes.heads]);
  });
  for (int64_t i = 0; i < count; ++i) {
    const T* const row = data<const T>(x) + choices[i].row * hidden;
    for (int64_t d = 0; d < hidden; ++d) work[i].residual[d] = row[d] + work[i].mixed[d];
    normalise(work[i].residual, of_block<const W>(of[kFeedForwardNorm], choices[i].block), hidden, T(eps),
              work[i].normed);
  }
  const Pieces pairs = sizes.pairs();
  for_each_task(count * pairs.number(), [&](int64_t task) {
    const int64_t i = task / pairs.number(), begin = pairs.begin(task % pairs.number());
    const int64_t outputs = pairs.end(task % pairs.number()) - begin;
    const W* const up = of_block<const W>(of[kUp], choices[i].block) + begin * hidden;
    T b[kOutputsOfStep];
    T* const a = work[i].inner + begin;
    matrix_vector(outputs, hidden, work[i].normed, up, hidden, a);
    matrix_vector(outputs, hidden, work[i].normed, up + sizes.width * hidden, hidden, b);
    for_each_vector<T>(outputs,
                       [&](int64_t f, auto part) { store(a + f, silu(load(a + f, part)) * load(b + f, part), part); });
  });
  add_outputs<T>(choices, out, [&](int64_t i, int64_t begin, int64_t end, T* y) {
    matrix_vector(end - begin, sizes.width, work[i].inner,
                  of_block<const W>(of[kDown], choices[i].block) + begin * sizes.width, sizes.width, y);
    for (int64_t o = begin; o < end; ++o) y[o - begin] += work[i].mixed[o];
  });
}

void slstm_step(const Tensor& x, const Tensor& experts, const Tensor& weights, int64_t first, const Tensor& norm,
                const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& if_proj, const Tensor& zo_proj,
                const Tensor& recurrent_weight, const Tensor& gate_bias, const Tensor& head_norm,
                const Tensor& ffn_norm, const Tensor& up_proj, const Tensor& down_proj, double eps, const Tensor& conv,
                const Tensor& c, const Tensor& n, const Tensor& m, const Tensor& h, const Tensor& out) {
  const int64_t blocks = up_proj.size(0);
  const Sizes sizes{up_proj.size(2), if_proj.size(1), conv_weight.size(2), down_proj.size(2)};
  check_rows(x, experts, out);
  check_state(conv, x, {blocks, sizes.taps - 1, sizes.hidden});
  for (const Tensor& state : {c, n, m, h}) {
    check_state(state, x, {blocks, sizes.heads, sizes.head()});
    TORCH_CHECK(state.dtype() == x.dtype(), "c, n, m and h must be stored as x is");
  }
  const auto choices = choices_among(experts, weights, first, blocks);
  if (choices.empty()) return;
  const auto of = stored_alike<kParameters>({norm, conv_weight, conv_bias, if_proj, zo_proj, recurrent_weight,
                                             gate_bias, head_norm, ffn_norm, up_proj, down_proj},
                                            x.scalar_type());
  const int64_t hidden = sizes.hidden, heads = sizes.heads, size = sizes.head();
  TORCH_CHECK(hidden % heads == 0, hidden, " channels can not be shared out among ", heads, " heads");
  const at::DimVector of_channels = {blocks, hidden}, projection = {blocks, heads, size, 2 * size};
  check_parameters<kParameters>(of, {{of_channels,
                                      {blocks, hidden, sizes.taps},
                                      of_channels,
                                      projection,
                                      projection,
                                      {blocks, heads, size, kGates, size},
                                      {blocks, heads, kGates, size},
                                      of_channels,
                                      of_channels,
                                      {blocks, 2 * sizes.width, hidden},
                                      {blocks, hidden, sizes.width}}});
  TORCH_CHECK((of[kUp].scalar_type() == at::kDouble) == (x.scalar_type() == at::kDouble),
              "x must be float64 where parameters are, and only there");
  by_stored_types(of[kUp], conv.scalar_type(), [&](auto w, auto s) {
    step<decltype(w), decltype(s)>(sizes, choices, of, eps, x, conv, c, n, m, h, out);
  });
  mark_as_changed({conv, c, n, m, h, out});
}

}  // namespace

// The schema stands in step.py.
TORCH_LIBRARY_IMPL(moxe, CPU, m) { m.impl("slstm_step_", &slstm_step); }

}  // namespace moxe

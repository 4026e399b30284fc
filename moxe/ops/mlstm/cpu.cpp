// The mLSTM cell in chunks; the equations are those of torch_backend.py, the arithmetic is laid out for one thread's caches.
//
// Legend: N packed tokens, H heads, Dh head size, G segments, J chunks of a segment, W tokens of a chunk.
//
// A task is one head of one segment and walks over its chunks, the matrix memory C in the second-level cache. With F_t
// the sum of log f inside the chunk up to t, s_j = i_j - F_j and g_t = max(m_0, max_{j <= t} s_j), the stabiliser is
// m_t = F_t + g_t and every weight is the exponential of a difference:
//
//     pair weight e^{s_j - g_t}        weight of the state y_t = e^{m_0 - g_t}        at the chunk's end e^{s_j - g_W}
//
// Matrices over pairs are stored [j][t] (key by query): sums over keys are then additions of whole rows. Only t >= j
// counts, and blocks of pairs with t < j throughout are never computed. The backward pass recomputes everything from
// the inputs. No number of one segment ever meets one of another.

#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

#include <algorithm>
#include <numeric>

namespace moxe {
namespace {

// Pairs are computed in squares of this width where the diagonal passes.
constexpr int64_t kBlock = 32;

int64_t padded_width(int64_t width) { return (width + kBlock - 1) / kBlock * kBlock; }

// The backward pass keeps one state a chunk: Dh^2 / W numbers a token, at most this many.
constexpr int64_t kStateNumbersPerToken = 800;

// Most tokens of a chunk that make a segment cheapest: W / 2 products a token inside a chunk, Dh between chunks.
int64_t cheapest_chunk(int64_t length, int64_t size) {
  int64_t narrowest = kBlock;
  while (narrowest * kStateNumbersPerToken < size * size && narrowest < 256) narrowest *= 2;
  int64_t best = narrowest;
  double least = 1e30;
  for (int64_t width = narrowest; width <= 256; width *= 2) {
    const int64_t chunks = (length + width - 1) / width;
    const double inside = 0.5 * static_cast<double>(std::min(width, length) + kBlock);
    const double between = static_cast<double>(size) * static_cast<double>(chunks - 1) / static_cast<double>(chunks);
    if (inside + between < least) least = inside + between, best = width;
  }
  return best;
}

// A segment's chunks are equal but for one token.
struct Chunks {
  int64_t begin, length, count;
  Chunks(int64_t begin, int64_t length, int64_t size, int64_t longest) : begin(begin), length(length) {
    const int64_t width = longest > 0 ? longest : cheapest_chunk(length, size);
    count = (length + width - 1) / width;
  }
  int64_t first(int64_t chunk) const { return begin + chunk * length / count; }
  int64_t width(int64_t chunk) const { return first(chunk + 1) - first(chunk); }
  int64_t widest() const { return (length + count - 1) / count; }
};

// y[i] = scale * x[i]
template <class T>
void scale_into(int64_t count, T scale, const T* x, T* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = scale * x[i];
}

template <class T>
T dot(int64_t count, const T* x, const T* y) {
  Vector<T> total{};
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) total += load(x + i) * load(y + i);
  T rest = sum(total);
  for (; i < count; ++i) rest += x[i] * y[i];
  return rest;
}

// Rows of one head of packed tokens [N, H, Dh].
template <class S>
struct Rows {
  S* first;
  int64_t stride;
  S* operator[](int64_t row) const { return first + row * stride; }
};

template <class S, class T>
void read_row(const S* from, int64_t size, T scale, T* to) {
  for (int64_t d = 0; d < size; ++d) to[d] = static_cast<T>(widen(from[d])) * scale;
}

template <class S, class T>
void write_row(const T* from, int64_t size, S* to) {
  for (int64_t d = 0; d < size; ++d) to[d] = narrow<S>(from[d]);
}

// The state of one head, C [Dh, Dh], n [Dh] and their scale m.
template <class T>
struct State {
  T* c;
  T* n;
  T m;
  bool empty;
};

// The log-weights of one chunk, each [padded width]; what lies behind the last token weighs nothing.
template <class T>
struct Weights {
  T *source, *g, *m, *y, *at_end;
  T decay;  // of the state, over the whole chunk

  Weights(Scratch& scratch, int64_t padded)
      : source(scratch.take<T>(padded)),
        g(scratch.take<T>(padded)),
        m(scratch.take<T>(padded)),
        y(scratch.take<T>(padded)),
        at_end(scratch.take<T>(padded)) {}
  static int64_t bytes(int64_t padded) { return 5 * Scratch::bytes_of<T>(padded); }

  void read(const T* igate, const T* fgate, int64_t stride, int64_t width, T m_before) {
    T sum_log_f = 0, highest = m_before;
    for (int64_t t = 0; t < width; ++t) {
      sum_log_f += log_sigmoid(fgate[t * stride]);
      source[t] = igate[t * stride] - sum_log_f;
      highest = maximum(highest, source[t]);
      g[t] = highest;
      m[t] = sum_log_f + highest;
      y[t] = std::exp(m_before - highest);
    }
    for (int64_t t = width; t < padded_width(width); ++t) {
      source[t] = m[t] = y[t] = 0;
      g[t] = std::numeric_limits<T>::infinity();
    }
    for (int64_t t = 0; t < width; ++t) at_end[t] = std::exp(source[t] - highest);
    decay = y[width - 1];
  }
};

// k and v of a chunk as rows [W, Dh], k scaled.
template <class T>
struct KeysAndValues {
  T *k, *v;
  KeysAndValues(Scratch& scratch, int64_t widest, int64_t size)
      : k(scratch.take<T>(widest * size)), v(scratch.take<T>(widest * size)) {}
  static int64_t bytes(int64_t widest, int64_t size) { return 2 * Scratch::bytes_of<T>(widest * size); }

  template <class S>
  void read(Rows<const S> keys, Rows<const S> values, int64_t first, int64_t width, int64_t size) {
    const T scale = 1 / std::sqrt(static_cast<T>(size));
    for (int64_t t = 0; t < width; ++t) {
      read_row(keys[first + t], size, scale, k + t * size);
      read_row(values[first + t], size, T(1), v + t * size);
    }
  }
};

// The state behind a chunk; `weighted` [W, Dh] receives k e^{s - g_W}.
template <class T>
void advance(State<T>& state, const Weights<T>& weights, const KeysAndValues<T>& chunk, int64_t width, int64_t size,
             T* weighted) {
  for (int64_t t = 0; t < width; ++t) scale_into(size, weights.at_end[t], chunk.k + t * size, weighted + t * size);
  if (state.empty) {
    std::fill(state.n, state.n + size, T(0));
    gemm<T, false>(size, size, width, weighted, 1, size, chunk.v, size, state.c, size);
  } else {
    scale_into(size * size, weights.decay, state.c, state.c);
    scale_into(size, weights.decay, state.n, state.n);
    gemm<T, true>(size, size, width, weighted, 1, size, chunk.v, size, state.c, size);
  }
  for (int64_t t = 0; t < width; ++t)
    for (int64_t d = 0; d < size; ++d) state.n[d] += weighted[t * size + d];
  state.m = weights.m[width - 1];
  state.empty = false;
}

// pair[j][t] = e^{s_j - g_t} for t >= j, else 0, over the blocks that are computed.
template <class T>
void pair_weights(const Weights<T>& weights, int64_t width, int64_t padded, T* pair) {
  Vector<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<T>(i);
  for (int64_t j = 0; j < width; ++j) {
    const Vector<T> source = fill(weights.source[j]);
    for (int64_t t = j / kBlock * kBlock; t < padded; t += kLanes<T>) {
      Vector<T> weight = exp(source - load(weights.g + t));
      if (t < j) weight = lane + static_cast<T>(t) < static_cast<T>(j) ? Vector<T>{} : weight;
      store(pair + j * padded + t, weight);
    }
  }
}

// pair[j][t] = sum_d keys[j][d] queries_t[d][t], over the blocks that are computed.
template <class T>
void pair_products(const T* keys, const T* queries_t, int64_t width, int64_t padded, int64_t size, T* pair) {
  for (int64_t j = 0; j < width; j += kBlock)
    gemm<T, false>(std::min(kBlock, width - j), padded - j, size, keys + j * size, size, 1, queries_t + j, padded,
                   pair + j * padded + j, padded);
}

// out[t] (+)= sum_{j <= t} pair[j][t] values[j]
template <class T, bool kAdd>
void sum_over_keys(const T* pair, const T* values, int64_t width, int64_t padded, int64_t size, T* out) {
  for (int64_t t = 0; t < width; t += kBlock)
    gemm<T, kAdd>(std::min(kBlock, width - t), size, std::min(t + kBlock, width), pair + t, 1, padded, values, size,
                  out + t * size, size);
}

// out[j] = sum_{t >= j} pair[j][t] values[t]
template <class T>
void sum_over_queries(const T* pair, const T* values, int64_t width, int64_t padded, int64_t size, T* out) {
  for (int64_t j = 0; j < width; j += kBlock)
    gemm<T, false>(std::min(kBlock, width - j), size, width - j, pair + j * padded + j, padded, 1, values + j * size,
                   size, out + j * size, size);
}

struct Problem {
  int64_t heads, size, longest;
  const int64_t* cu_seqlens;
  std::vector<int64_t> order;  // segments, longest first

  Problem(const Tensor& q, const Tensor& cu, int64_t longest)
      : heads(q.size(1)), size(q.size(2)), longest(longest), cu_seqlens(data<const int64_t>(cu)),
        order(cu.size(0) - 1) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
  }
  int64_t length(int64_t segment) const { return cu_seqlens[segment + 1] - cu_seqlens[segment]; }
  Chunks chunks(int64_t segment) const { return {cu_seqlens[segment], length(segment), size, longest}; }
  template <class S>
  Rows<S> rows(const Tensor& x, int64_t head) const {
    return {data<S>(x) + head * size, heads * size};
  }
  template <class F>
  void for_each_head(const F& body) const {
    for_each_task(static_cast<int64_t>(order.size()) * heads,
                  [&](int64_t task) { body(order[task / heads], task % heads); });
  }
};

// The state of each segment and head in tensors [G, H, Dh, Dh], [G, H, Dh], [G, H]; null when there is none.
template <class T>
struct StatePointers {
  T *c, *n, *m;
  void read(int64_t at, int64_t size, State<T>& state) const {
    state.empty = c == nullptr;
    state.m = state.empty ? -std::numeric_limits<T>::infinity() : m[at];
    if (state.empty) return;
    std::copy(c + at * size * size, c + (at + 1) * size * size, state.c);
    std::copy(n + at * size, n + (at + 1) * size, state.n);
  }
};

template <class S, class T = ComputeType<S>>
void forward_head(const Problem& problem, int64_t segment, int64_t head, const Tensor& q, const Tensor& k,
                  const Tensor& v, const T* igate, const T* fgate, StatePointers<T> initial, StatePointers<T> final,
                  const Tensor& h) {
  const int64_t size = problem.size, at = segment * problem.heads + head;
  const Chunks chunks = problem.chunks(segment);
  const int64_t widest = chunks.count > 0 ? chunks.widest() : 0, padded_most = padded_width(widest);
  Scratch scratch(Scratch::bytes_of<T>(size * size) + 2 * Scratch::bytes_of<T>(size) + Weights<T>::bytes(padded_most) +
                  KeysAndValues<T>::bytes(widest, size) + 3 * Scratch::bytes_of<T>(widest * size) +
                  Scratch::bytes_of<T>(size * padded_most) + 2 * Scratch::bytes_of<T>(widest * padded_most) +
                  Scratch::bytes_of<T>(padded_most));
  // The final state, if asked for, is worked on in place.
  const bool keeps = final.c != nullptr;
  State<T> state{keeps ? final.c + at * size * size : scratch.take<T>(size * size),
                 keeps ? final.n + at * size : scratch.take<T>(size), 0, true};
  initial.read(at, size, state);
  Weights<T> weights(scratch, padded_most);
  KeysAndValues<T> chunk(scratch, widest, size);
  T *queries = scratch.take<T>(widest * size), *numerator = scratch.take<T>(widest * size);
  T *weighted = scratch.take<T>(widest * size), *queries_t = scratch.take<T>(size * padded_most);
  T *score = scratch.take<T>(widest * padded_most), *pair = scratch.take<T>(widest * padded_most);
  T *denominator = scratch.take<T>(padded_most);

  for (int64_t number = 0; number < chunks.count; ++number) {
    const int64_t first = chunks.first(number), width = chunks.width(number), padded = padded_width(width);
    const int64_t gate = first * problem.heads + head;
    weights.read(igate + gate, fgate + gate, problem.heads, width, state.m);
    chunk.read(problem.rows<const S>(k, head), problem.rows<const S>(v, head), first, width, size);
    const auto q_rows = problem.rows<const S>(q, head);
    for (int64_t t = 0; t < width; ++t) read_row(q_rows[first + t], size, T(1), queries + t * size);
    if (padded > width) std::fill(queries_t, queries_t + size * padded, T(0));
    transpose(width, size, queries, size, queries_t, padded);

    pair_products(chunk.k, queries_t, width, padded, size, score);
    pair_weights(weights, width, padded, pair);
    std::fill(denominator, denominator + padded, T(0));
    for (int64_t j = 0; j < width; ++j)
      for (int64_t t = j / kBlock * kBlock; t < padded; t += kLanes<T>) {
        const Vector<T> s = load(score + j * padded + t) * load(pair + j * padded + t);
        store(score + j * padded + t, s);
        store(denominator + t, load(denominator + t) + s);
      }
    if (state.empty) {
      sum_over_keys<T, false>(score, chunk.v, width, padded, size, numerator);
    } else {
      gemm<T, false>(width, size, size, queries, size, 1, state.c, size, numerator, size);
      for (int64_t t = 0; t < width; ++t) {
        scale_into(size, weights.y[t], numerator + t * size, numerator + t * size);
        denominator[t] += weights.y[t] * dot(size, queries + t * size, state.n);
      }
      sum_over_keys<T, true>(score, chunk.v, width, padded, size, numerator);
    }
    const auto h_rows = problem.rows<S>(h, head);
    for (int64_t t = 0; t < width; ++t) {
      const T divisor = maximum(std::abs(denominator[t]), std::exp(-weights.m[t]));
      scale_into(size, 1 / divisor, numerator + t * size, numerator + t * size);
      write_row(numerator + t * size, size, h_rows[first + t]);
    }
    if (keeps || number + 1 < chunks.count) advance(state, weights, chunk, width, size, weighted);
  }
  if (!keeps) return;
  if (state.empty) {  // a segment without tokens
    std::fill(state.c, state.c + size * size, T(0));
    std::fill(state.n, state.n + size, T(0));
  }
  final.m[at] = state.m;
}

// What the loss's gradient is, of the inputs of one segment and head.
template <class T>
struct BackwardPointers {
  const T *dc_final, *dn_final;  // null: zero
  T *dc0, *dn0;                  // null: not wanted
  T *digate, *dfgate;
};

template <class S, class T = ComputeType<S>>
void backward_head(const Problem& problem, int64_t segment, int64_t head, const Tensor& q, const Tensor& k,
                   const Tensor& v, const T* igate, const T* fgate, StatePointers<T> initial, const OptionalTensor& dh,
                   BackwardPointers<T> gradient, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const int64_t size = problem.size, heads = problem.heads, at = segment * heads + head, square = size * size;
  const Chunks chunks = problem.chunks(segment);
  const int64_t widest = chunks.count > 0 ? chunks.widest() : 0, padded_most = padded_width(widest);
  const int64_t states_kept = std::max<int64_t>(chunks.count, 1);
  Scratch scratch((states_kept + 1) * Scratch::bytes_of<T>(square) + (states_kept + 1) * Scratch::bytes_of<T>(size) +
                  Weights<T>::bytes(padded_most) + KeysAndValues<T>::bytes(widest, size) +
                  6 * Scratch::bytes_of<T>(widest * size) + 5 * Scratch::bytes_of<T>(size * padded_most) +
                  3 * Scratch::bytes_of<T>(widest * padded_most) + 4 * Scratch::bytes_of<T>(padded_most));
  std::vector<State<T>> before(states_kept);  // the state before each chunk
  for (auto& state : before) state = {scratch.take<T>(square), scratch.take<T>(size), 0, true};
  T *dc = scratch.take<T>(square), *dn = scratch.take<T>(size);
  Weights<T> weights(scratch, padded_most);
  KeysAndValues<T> chunk(scratch, widest, size);
  T *queries = scratch.take<T>(widest * size), *dnumerator = scratch.take<T>(widest * size);
  T *weighted = scratch.take<T>(widest * size), *dkeys = scratch.take<T>(widest * size);
  T *dvalues = scratch.take<T>(widest * size), *dqueries = scratch.take<T>(widest * size);
  T *queries_t = scratch.take<T>(size * padded_most), *dnumerator_t = scratch.take<T>(size * padded_most);
  T *values_t = scratch.take<T>(size * padded_most), *dqueries_t = scratch.take<T>(size * padded_most);
  T *dkeys_t = scratch.take<T>(size * padded_most);
  T *score = scratch.take<T>(widest * padded_most), *pair = scratch.take<T>(widest * padded_most);
  T *dscore = scratch.take<T>(widest * padded_most);
  T *denominator = scratch.take<T>(padded_most), *ddenominator = scratch.take<T>(padded_most);
  T *db = scratch.take<T>(padded_most), *across = scratch.take<T>(padded_most);

  const auto k_rows = problem.rows<const S>(k, head), v_rows = problem.rows<const S>(v, head);
  const auto q_rows = problem.rows<const S>(q, head);
  const auto read_chunk = [&](int64_t number) {
    const int64_t first = chunks.first(number), gate = first * heads + head;
    weights.read(igate + gate, fgate + gate, heads, chunks.width(number), before[number].m);
    chunk.read(k_rows, v_rows, first, chunks.width(number), size);
  };

  initial.read(at, size, before[0]);
  for (int64_t number = 0; number + 1 < chunks.count; ++number) {
    read_chunk(number);
    State<T>& next = before[number + 1];
    if (!before[number].empty) {
      std::copy(before[number].c, before[number].c + square, next.c);
      std::copy(before[number].n, before[number].n + size, next.n);
      next.empty = false;
    }
    advance(next, weights, chunk, chunks.width(number), size, weighted);
  }

  // Gradient of the state behind the chunk at hand, as that state is written down.
  bool has_dstate = gradient.dc_final != nullptr || gradient.dn_final != nullptr;
  std::fill(dc, dc + square, T(0));
  std::fill(dn, dn + size, T(0));
  if (gradient.dc_final != nullptr) std::copy_n(gradient.dc_final + at * square, square, dc);
  if (gradient.dn_final != nullptr) std::copy_n(gradient.dn_final + at * size, size, dn);

  for (int64_t number = chunks.count - 1; number >= 0; --number) {
    const int64_t first = chunks.first(number), width = chunks.width(number), padded = padded_width(width);
    const State<T>& state = before[number];
    read_chunk(number);
    for (int64_t t = 0; t < width; ++t) read_row(q_rows[first + t], size, T(1), queries + t * size);
    if (padded > width)
      for (T* x : {queries_t, dnumerator_t, values_t}) std::fill(x, x + size * padded, T(0));
    transpose(width, size, queries, size, queries_t, padded);

    // Score, denominator, and the gradient of the numerator.
    pair_products(chunk.k, queries_t, width, padded, size, score);
    pair_weights(weights, width, padded, pair);
    std::fill(denominator, denominator + padded, T(0));
    for (int64_t j = 0; j < width; ++j)
      for (int64_t t = j / kBlock * kBlock; t < padded; t += kLanes<T>) {
        const Vector<T> s = load(score + j * padded + t) * load(pair + j * padded + t);
        store(score + j * padded + t, s);
        store(denominator + t, load(denominator + t) + s);
      }
    if (!state.empty)
      for (int64_t t = 0; t < width; ++t)
        denominator[t] += weights.y[t] * dot(size, queries + t * size, state.n);
    for (int64_t t = 0; t < width; ++t) {
      const T divisor = maximum(std::abs(denominator[t]), std::exp(-weights.m[t]));
      if (dh.has_value())
        read_row(problem.rows<const S>(*dh, head)[first + t], size, 1 / divisor, dnumerator + t * size);
      else
        std::fill(dnumerator + t * size, dnumerator + (t + 1) * size, T(0));
    }
    transpose(width, size, dnumerator, size, dnumerator_t, padded);

    // <dnumerator, numerator> of each token, from the products that the gradients need anyway.
    pair_products(chunk.v, dnumerator_t, width, padded, size, dscore);
    std::fill(ddenominator, ddenominator + padded, T(0));
    std::fill(db, db + padded, T(0));
    for (int64_t j = 0; j < width; ++j)
      for (int64_t t = j / kBlock * kBlock; t < padded; t += kLanes<T>)
        store(ddenominator + t,
              load(ddenominator + t) + load(dscore + j * padded + t) * load(score + j * padded + t));
    if (!state.empty) {
      gemm<T, false>(size, padded, size, state.c, size, 1, dnumerator_t, padded, dqueries_t, padded);
      for (int64_t d = 0; d < size; ++d)
        for (int64_t t = 0; t < padded; t += kLanes<T>)
          store(db + t, load(db + t) + load(queries_t + d * padded + t) * load(dqueries_t + d * padded + t));
      for (int64_t t = 0; t < padded; ++t) db[t] *= weights.y[t], ddenominator[t] += db[t];
    }
    for (int64_t t = 0; t < width; ++t) {
      const T floor = std::exp(-weights.m[t]), size_of = std::abs(denominator[t]);
      const T divisor = maximum(size_of, floor);
      const T sign = denominator[t] > 0 ? T(1) : denominator[t] < 0 ? T(-1) : T(0);
      ddenominator[t] = size_of >= floor ? -ddenominator[t] / divisor * sign : ddenominator[t] * 0;
    }

    // Through the pairs: dscore becomes the gradient of q . k, score that of the log-weights.
    for (int64_t j = 0; j < width; ++j)
      for (int64_t t = j / kBlock * kBlock; t < padded; t += kLanes<T>) {
        T *ds = dscore + j * padded + t, *s = score + j * padded + t;
        store(ds, load(ds) + load(ddenominator + t));
      }
    sum_over_queries(score, dnumerator, width, padded, size, dvalues);
    for (int64_t j = 0; j < width; ++j)
      for (int64_t t = j / kBlock * kBlock; t < padded; t += kLanes<T>) {
        T *ds = dscore + j * padded + t, *s = score + j * padded + t;
        store(s, load(ds) * load(s));
        store(ds, load(ds) * load(pair + j * padded + t));
      }
    sum_over_keys<T, false>(dscore, chunk.k, width, padded, size, dqueries);
    sum_over_queries(dscore, queries, width, padded, size, dkeys);

    // Through the state before the chunk.
    if (!state.empty) {
      for (int64_t d = 0; d < size; ++d)
        for (int64_t t = 0; t < padded; t += kLanes<T>) {
          T* x = dqueries_t + d * padded + t;
          store(x, load(weights.y + t) * (load(x) + state.n[d] * load(ddenominator + t)));
        }
      for (int64_t t = 0; t < width; ++t)
        db[t] += weights.y[t] * ddenominator[t] * dot(size, queries + t * size, state.n);
      transpose(size, width, dqueries_t, padded, weighted, size);
      for (int64_t i = 0; i < width * size; ++i) dqueries[i] += weighted[i];
    }

    // Through the state behind it.
    if (has_dstate) {
      transpose(width, size, chunk.v, size, values_t, padded);
      gemm<T, false>(size, padded, size, dc, size, 1, values_t, padded, dkeys_t, padded);
      transpose(size, width, dkeys_t, padded, weighted, size);
      for (int64_t t = 0; t < width; ++t) {
        T *dkey = weighted + t * size, *key = chunk.k + t * size;
        for (int64_t d = 0; d < size; ++d) dkey[d] = weights.at_end[t] * (dkey[d] + dn[d]);
        for (int64_t d = 0; d < size; ++d) dkeys[t * size + d] += dkey[d];
        score[t * padded + width - 1] += dot(size, dkey, key);
        scale_into(size, weights.at_end[t], key, weighted + t * size);
      }
      gemm<T, true>(width, size, size, weighted, size, 1, dc, size, dvalues, size);
      if (!state.empty) db[width - 1] += weights.decay * (dot(square, dc, state.c) + dot(size, dn, state.n));
    }
    if (!state.empty || (number == 0 && gradient.dc0 != nullptr)) {
      for (int64_t t = 0; t < width; ++t) scale_into(size, weights.y[t], queries + t * size, weighted + t * size);
      scale_into(square, weights.decay, dc, dc);
      gemm<T, true>(size, size, width, weighted, 1, size, dnumerator, size, dc, size);
      scale_into(size, weights.decay, dn, dn);
      for (int64_t t = 0; t < width; ++t)
        for (int64_t d = 0; d < size; ++d) dn[d] += weighted[t * size + d] * ddenominator[t];
      has_dstate = true;
    }

    // Log-weights to gates: log f_s takes part in the pairs j < s <= t, and in y_t for s <= t. Summed pair by pair,
    // which stays accurate when the gate is shut (a difference of two long sums does not).
    std::fill(across, across + padded, T(0));
    T later = 0;
    for (int64_t t = width - 1; t >= 0; --t) later += db[t], db[t] = later;
    for (int64_t j = 0; j < width; ++j) {
      const int64_t gate = (first + j) * heads + head;
      T dlog_f = db[j];
      Vector<T> pairs_across{};
      for (int64_t t = j / kBlock * kBlock; t < padded; t += kLanes<T>) pairs_across += load(across + t);
      dlog_f += sum(pairs_across);
      Vector<T> own{};
      for (int64_t t = j / kBlock * kBlock; t < padded; t += kLanes<T>) {
        const Vector<T> x = load(score + j * padded + t);
        own += x;
        store(across + t, load(across + t) + x);
      }
      across[j] = 0;  // t = j no longer lies behind what follows
      gradient.digate[gate] = sum(own);
      gradient.dfgate[gate] = dlog_f / (1 + std::exp(fgate[gate]));
    }

    const T scale = 1 / std::sqrt(static_cast<T>(size));
    const auto dq_rows = problem.rows<S>(dq, head), dk_rows = problem.rows<S>(dk, head);
    const auto dv_rows = problem.rows<S>(dv, head);
    for (int64_t t = 0; t < width; ++t) {
      scale_into(size, scale, dkeys + t * size, dkeys + t * size);
      write_row(dqueries + t * size, size, dq_rows[first + t]);
      write_row(dkeys + t * size, size, dk_rows[first + t]);
      write_row(dvalues + t * size, size, dv_rows[first + t]);
    }
  }
  if (gradient.dc0 != nullptr) {
    std::copy_n(dc, square, gradient.dc0 + at * square);
    std::copy_n(dn, size, gradient.dn0 + at * size);
  }
}

template <class T>
StatePointers<T> pointers(const OptionalTensor& c, const OptionalTensor& n, const OptionalTensor& m) {
  return {data<T>(c), data<T>(n), data<T>(m)};
}

// All tensors are contiguous; gates and states are float32 (float64 for float64), q, k, v may be bfloat16.
std::tuple<Tensor, Tensor, Tensor, Tensor> mlstm_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const Tensor& igate, const Tensor& fgate,
                                                         const Tensor& cu_seqlens, const OptionalTensor& c0,
                                                         const OptionalTensor& n0, const OptionalTensor& m0,
                                                         int64_t longest_chunk, bool return_final_state) {
  const Problem problem(q, cu_seqlens, longest_chunk);
  const int64_t segments = return_final_state ? cu_seqlens.size(0) - 1 : 0;
  const auto options = core_options(q);
  Tensor h = at::empty(q.sizes(), q.options());
  Tensor c = at::empty({segments, problem.heads, problem.size, problem.size}, options);
  Tensor n = at::empty({segments, problem.heads, problem.size}, options);
  Tensor m = at::empty({segments, problem.heads}, options);
  by_stored_type(q, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const auto initial = pointers<T>(c0, n0, m0);
    const auto final = return_final_state ? StatePointers<T>{data<T>(c), data<T>(n), data<T>(m)} : StatePointers<T>{};
    problem.for_each_head([&](int64_t segment, int64_t head) {
      forward_head<S>(problem, segment, head, q, k, v, data<const T>(igate), data<const T>(fgate), initial, final, h);
    });
  });
  return {h, c, n, m};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& igate, const Tensor& fgate,
    const Tensor& cu_seqlens, const OptionalTensor& c0, const OptionalTensor& n0, const OptionalTensor& m0,
    int64_t longest_chunk, const OptionalTensor& dh, const OptionalTensor& dc_final, const OptionalTensor& dn_final) {
  const Problem problem(q, cu_seqlens, longest_chunk);
  const int64_t segments = c0.has_value() ? cu_seqlens.size(0) - 1 : 0;
  const auto options = core_options(q);
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty_like(dq), dv = at::empty_like(dq);
  Tensor digate = at::empty(igate.sizes(), options), dfgate = at::empty_like(digate);
  Tensor dc0 = at::empty({segments, problem.heads, problem.size, problem.size}, options);
  Tensor dn0 = at::empty({segments, problem.heads, problem.size}, options);
  by_stored_type(q, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const auto initial = pointers<T>(c0, n0, m0);
    BackwardPointers<T> gradient{data<const T>(dc_final), data<const T>(dn_final), nullptr, nullptr, data<T>(digate),
                                 data<T>(dfgate)};
    if (c0.has_value()) gradient.dc0 = data<T>(dc0), gradient.dn0 = data<T>(dn0);
    problem.for_each_head([&](int64_t segment, int64_t head) {
      backward_head<S>(problem, segment, head, q, k, v, data<const T>(igate), data<const T>(fgate), initial, dh,
                       gradient, dq, dk, dv);
    });
  });
  return {dq, dk, dv, digate, dfgate, dc0, dn0};
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("mlstm_cpu", &mlstm_forward);
  m.impl("mlstm_cpu_backward", &mlstm_backward);
}

}  // namespace moxe

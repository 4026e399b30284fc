// The sLSTM cell, forward and backward: the equations of reference.py, b being the bias of the gates.
//
// Legend: N packed tokens, H heads, Dh head size, P = Dh padded to whole vectors, G segments, E groups, L live rows.
//
//     [i~, f~, z~, o~] = gates_t + b + R h_{t-1}        kept = log sigmoid(f~) + m_{t-1}      gap = i~ - kept
//     i = e^{min(gap, 0)}    f = e^{min(-gap, 0)}       m_t = max(kept, i~)
//     c_t = f c_{t-1} + i tanh(z~)    n_t = f n_{t-1} + i    h_t = sigmoid(o~) c_t / n_t
//
// Backward, dc and dn arriving from step t + 1, dh from outside and from step t + 1:
//
//     dc += dh o / n    dn -= dh h / n    do~ = dh h (1 - o)    dz~ = dc i (1 - z^2)    di~ = (dc z + dn) i
//     df~ = (dc c_{t-1} + dn n_{t-1}) f sigmoid(-f~)    dc_{t-1} = f dc    dn_{t-1} = f dn
//     dh_{t-1} = R^T d[i~ f~ z~ o~]
//     dR = sum h_{t-1} d[i~ f~ z~ o~]^T    db = sum d[i~ f~ z~ o~]
//
// A task is one head of a tile of segments. Its segments are ordered by length, longest first, so those alive at a step
// are a prefix, and a step is one small product with R, which stays in the second-level cache, and one pass over the
// gates. dR is the sum over all tokens of a group: a second round of tasks, one a head and gate, each of which adds up
// its tokens in order, so the result does not depend on the threads. No row's arithmetic depends on other rows.

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"
#include "slstm/cell.h"

namespace moxe {
namespace {

constexpr int kGates = 4;
// What the backward pass needs of a token and head, [6, Dh]: gap, f~, tanh(z~), sigmoid(o~), c and n.
enum Saved { kGap, kForget, kCell, kOutput, kMemory, kNormaliser, kSavedRows };

// Rows that one product takes: more would drive R out of the second-level cache.
constexpr int64_t kMostRows = 32;
// Tokens whose contribution to dR is added at once.
constexpr int64_t kTokensAtOnce = 64;
// How far ahead of them memory is asked for.
constexpr int64_t kTokensAhead = 8;

template <class T>
int64_t padded(int64_t size) {
  return (size + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// ---- Products with R --------------------------------------------------------------------------------------------

// A [K, N] matrix (N in whole vectors) as panels of two vectors' width, each one run of memory that a product streams.
template <class T>
struct Panels {
  static constexpr int64_t kWidth = 2 * kLanes<T>;
  T* memory;
  int64_t rows, columns;

  T* panel(int64_t column) const { return memory + column * rows; }
  int64_t width(int64_t column) const { return std::min(kWidth, columns - column); }
};

// R [Dh, 4, Dh] of one head as [Dh, 4 P].
template <class T>
Panels<T> pack(const T* recurrent, int64_t size, T* memory) {
  const int64_t wide = padded<T>(size);
  const Panels<T> panels{memory, size, kGates * wide};
  for (int64_t gate = 0; gate < kGates; ++gate)
    for_each_vector<T>(size, [&](int64_t d, auto width) {
      const int64_t column = gate * wide + d, first = column / Panels<T>::kWidth * Panels<T>::kWidth;
      T* to = panels.panel(first) + (column - first);
      const T* from = recurrent + gate * size + d;
      for (int64_t k = 0; k < size; ++k) store(to + k * panels.width(first), load(from + k * kGates * size, width));
    });
  return panels;
}

// The transpose [4 P, Dh], its columns padded to P.
template <class T>
Panels<T> pack_transposed(const T* recurrent, int64_t size, T* memory) {
  const int64_t wide = padded<T>(size);
  const Panels<T> panels{memory, kGates * wide, wide};
  std::fill_n(memory, kGates * wide * wide, T(0));
  for (int64_t first = 0; first < size; first += Panels<T>::kWidth)
    for (int64_t gate = 0; gate < kGates; ++gate) {
      const int64_t width = panels.width(first);
      transpose(std::min(width, size - first), size, recurrent + (first * kGates + gate) * size, kGates * size,
                panels.panel(first) + gate * wide * width, width);
    }
  return panels;
}

template <class T, int kVectors>
void multiply_panel(int64_t M, int64_t K, const T* a, int64_t lda, const T* b, T* c, int64_t ldc) {
  constexpr int64_t kRows = 8, kStride = kVectors * kLanes<T>;
  // Tiles of nearly equal height: a tile of one or two rows waits for memory.
  for (int64_t tiles = (M + kRows - 1) / kRows; tiles > 0; --tiles) {
    const int64_t rows = (M + tiles - 1) / tiles;
    switch (rows) {
      case 1: gemm_tile<T, false, 1, kVectors>(K, a, lda, 1, b, kStride, c, ldc); break;
      case 2: gemm_tile<T, false, 2, kVectors>(K, a, lda, 1, b, kStride, c, ldc); break;
      case 3: gemm_tile<T, false, 3, kVectors>(K, a, lda, 1, b, kStride, c, ldc); break;
      case 4: gemm_tile<T, false, 4, kVectors>(K, a, lda, 1, b, kStride, c, ldc); break;
      case 5: gemm_tile<T, false, 5, kVectors>(K, a, lda, 1, b, kStride, c, ldc); break;
      case 6: gemm_tile<T, false, 6, kVectors>(K, a, lda, 1, b, kStride, c, ldc); break;
      case 7: gemm_tile<T, false, 7, kVectors>(K, a, lda, 1, b, kStride, c, ldc); break;
      default: gemm_tile<T, false, 8, kVectors>(K, a, lda, 1, b, kStride, c, ldc); break;
    }
    M -= rows;
    a += rows * lda;
    c += rows * ldc;
  }
}

// C [M, N] = A [M, K] B.
template <class T>
void multiply(int64_t M, const T* a, int64_t lda, const Panels<T>& b, T* c, int64_t ldc) {
  for (int64_t n = 0; n < b.columns; n += Panels<T>::kWidth) {
    if (b.width(n) == Panels<T>::kWidth)
      multiply_panel<T, 2>(M, b.rows, a, lda, b.panel(n), c + n, ldc);
    else
      multiply_panel<T, 1>(M, b.rows, a, lda, b.panel(n), c + n, ldc);
  }
}

// ---- Tasks --------------------------------------------------------------------------------------------------------

// Segments of one group that a task carries along together, longest first.
struct Tile {
  int64_t group;
  std::vector<int64_t> segments;
  int64_t tokens;
};

struct Layout {
  int64_t tokens, heads, size;
  const int64_t* cu_seqlens;
  at::IntArrayRef group_offsets;

  int64_t groups() const { return static_cast<int64_t>(group_offsets.size()) - 1; }
  int64_t segments() const { return group_offsets.back(); }
  int64_t begin(int64_t segment) const { return cu_seqlens[segment]; }
  int64_t length(int64_t segment) const { return cu_seqlens[segment + 1] - cu_seqlens[segment]; }
  // Where [.., H, rows, Dh] holds an item's rows of a head.
  int64_t at(int64_t item, int64_t head, int64_t rows = 1) const { return (item * heads + head) * rows * size; }
};

// Into how many tiles each group is cut at least, so that every thread has work and none is left with the last task.
int64_t tiles_of_a_group(const Layout& layout) {
  const int64_t threads = at::get_num_threads();
  int64_t whole = 0, most = 1;
  for (int64_t e = 0; e < layout.groups(); ++e) {
    const int64_t segments = layout.group_offsets[e + 1] - layout.group_offsets[e];
    whole += segments > 0 ? layout.heads : 0;
    most = std::max(most, segments);
  }
  int64_t tiles = 1;
  while (tiles < most && whole * tiles < 4 * threads && (whole * tiles) % threads != 0) ++tiles;
  return tiles;
}

std::vector<Tile> tiles_of(const Layout& layout) {
  const int64_t wanted = tiles_of_a_group(layout);
  std::vector<Tile> tiles;
  for (int64_t e = 0; e < layout.groups(); ++e) {
    std::vector<int64_t> segments(layout.group_offsets[e + 1] - layout.group_offsets[e]);
    std::iota(segments.begin(), segments.end(), layout.group_offsets[e]);
    std::stable_sort(segments.begin(), segments.end(),
                     [&](int64_t a, int64_t b) { return layout.length(a) > layout.length(b); });
    const int64_t count = static_cast<int64_t>(segments.size());
    const int64_t rows = std::min((count + wanted - 1) / wanted, kMostRows);
    for (int64_t first = 0; first < count; first += rows) {
      Tile tile{e, {segments.begin() + first, segments.begin() + std::min(first + rows, count)}, 0};
      for (const int64_t segment : tile.segments) tile.tokens += layout.length(segment);
      tiles.push_back(std::move(tile));
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.tokens > b.tokens; });
  return tiles;
}

// How many of a tile's segments have a token at step t, given how many had one at a step before.
int64_t live_rows(const Layout& layout, const Tile& tile, int64_t t, int64_t most) {
  while (most > 0 && layout.length(tile.segments[most - 1]) <= t) --most;
  return most;
}

// Rows of a tile's segments from [G, H, Dh] to [rows, P] and back; without a state, `otherwise`.
template <class T>
void read_state(const Layout& layout, const Tile& tile, int64_t head, const T* state, T otherwise, T* to) {
  const int64_t wide = padded<T>(layout.size);
  for (const int64_t segment : tile.segments) {
    std::fill_n(to, wide, otherwise);
    if (state != nullptr) std::copy_n(state + layout.at(segment, head), layout.size, to);
    to += wide;
  }
}

template <class T>
void write_state(const Layout& layout, const Tile& tile, int64_t head, const T* from, T* state) {
  if (state == nullptr) return;
  for (const int64_t segment : tile.segments) {
    std::copy_n(from, layout.size, state + layout.at(segment, head));
    from += padded<T>(layout.size);
  }
}

// ---- Forward ------------------------------------------------------------------------------------------------------

template <class S>
struct Forward {
  using T = ComputeType<S>;
  using V = Vector<T>;

  Layout layout;
  const S* gates;
  int64_t gates_stride;
  const T *recurrent, *bias;      // bias may be missing
  const T *c0, *n0, *m0, *h0;     // all may be missing
  S* h;
  T *c_last, *n_last, *m_last, *h_last;  // all may be missing
  T *saved, *hidden;              // may be missing; hidden is h in the precision of the arithmetic

  struct Rows {
    T *c, *n, *m, *h, *product;
  };

  void run(const Tile& tile, int64_t head) const {
    const int64_t size = layout.size, wide = padded<T>(size), most = static_cast<int64_t>(tile.segments.size());
    Scratch scratch(Scratch::bytes_of<T>(kGates * wide * (1 + most + size)) + 4 * Scratch::bytes_of<T>(most * wide));
    T* const own_bias = scratch.take<T>(kGates * wide);
    for (int64_t gate = 0; gate < kGates; ++gate) {
      std::fill_n(own_bias + gate * wide, wide, T(0));
      if (bias != nullptr)
        std::copy_n(bias + layout.at(tile.group, head, kGates) + gate * size, size, own_bias + gate * wide);
    }
    Rows rows;
    rows.product = scratch.take<T>(most * kGates * wide);
    for (T** state : {&rows.c, &rows.n, &rows.m, &rows.h}) *state = scratch.take<T>(most * wide);
    read_state(layout, tile, head, c0, T(0), rows.c);
    read_state(layout, tile, head, n0, T(0), rows.n);
    read_state(layout, tile, head, m0, -std::numeric_limits<T>::infinity(), rows.m);
    read_state(layout, tile, head, h0, T(0), rows.h);
    const T* const own = recurrent + layout.at(tile.group, head, size * kGates);
    const Panels<T> panels = pack(own, size, scratch.take<T>(size * kGates * wide));

    int64_t live = live_rows(layout, tile, 0, most);
    for (int64_t t = 0; live > 0; live = live_rows(layout, tile, ++t, live)) {
      if (t > 0 || h0 != nullptr)
        multiply(live, rows.h, wide, panels, rows.product, kGates * wide);
      else
        std::fill_n(rows.product, live * kGates * wide, T(0));
      for (int64_t row = 0; row < live; ++row)
        advance(layout.begin(tile.segments[row]) + t, head, own_bias, row * wide, rows);
    }
    write_state(layout, tile, head, rows.c, c_last);
    write_state(layout, tile, head, rows.n, n_last);
    write_state(layout, tile, head, rows.m, m_last);
    write_state(layout, tile, head, rows.h, h_last);
  }

  // One row through one token; `at` is where the row's state lies.
  void advance(int64_t token, int64_t head, const T* own_bias, int64_t at, const Rows& rows) const {
    const int64_t size = layout.size, wide = padded<T>(size);
    const S* const of_token = gates + token * gates_stride + head * kGates * size;
    const T* const product = rows.product + kGates * at;
    S* const h_of_token = h + layout.at(token, head);
    T* const hidden_of_token = hidden == nullptr ? nullptr : hidden + layout.at(token, head);
    T* const save = saved == nullptr ? nullptr : saved + layout.at(token, head, kSavedRows);
    for_each_vector<T>(size, [&](int64_t d, auto width) {
      const auto gate = [&](int64_t g) {
        // A head's rows of one token and the next lie too far apart for the processor to guess.
        fetch(of_token + gates_stride + g * size + d);
        return load(product + g * wide + d) + load(own_bias + g * wide + d) + load(of_token + g * size + d, width);
      };
      const V fgate = gate(1);
      const auto now = advance_cell(gate(0), fgate, gate(2), gate(3), load(rows.c + at + d), load(rows.n + at + d),
                                    load(rows.m + at + d));
      store(rows.c + at + d, now.c);
      store(rows.n + at + d, now.n);
      store(rows.m + at + d, now.m);
      store(rows.h + at + d, now.h);
      store(h_of_token + d, now.h, width);
      if (hidden_of_token != nullptr) store(hidden_of_token + d, now.h, width);
      if (save == nullptr) return;
      store(save + kGap * size + d, now.gap, width);
      store(save + kForget * size + d, fgate, width);
      store(save + kCell * size + d, now.z, width);
      store(save + kOutput * size + d, now.o, width);
      store(save + kMemory * size + d, now.c, width);
      store(save + kNormaliser * size + d, now.n, width);
    });
  }
};

// ---- Backward -----------------------------------------------------------------------------------------------------

template <class S>
struct Backward {
  using T = ComputeType<S>;
  using V = Vector<T>;

  Layout layout;
  const T* recurrent;
  const T *c0, *n0, *h0;  // all may be missing
  const T *saved, *hidden;
  const S* dh;                             // may be missing
  const T *dc_last, *dn_last, *dh_last;    // each may be missing
  T* dgates;
  S* dgates_stored;  // where the gates are stored in another precision than that of dgates
  T *drecurrent, *dbias;  // dbias may be missing
  T *dc0, *dn0, *dh0;  // all may be missing

  struct Rows {
    T *dc, *dn, *dh, *dgates;
  };

  // The recurrence of a tile, last step first.
  void run(const Tile& tile, int64_t head) const {
    const int64_t size = layout.size, wide = padded<T>(size), most = static_cast<int64_t>(tile.segments.size());
    Scratch scratch(Scratch::bytes_of<T>(kGates * wide * (most + wide)) + 3 * Scratch::bytes_of<T>(most * wide));
    Rows rows;
    rows.dgates = scratch.take<T>(most * kGates * wide);
    for (T** state : {&rows.dc, &rows.dn, &rows.dh}) *state = scratch.take<T>(most * wide);
    std::fill_n(rows.dgates, most * kGates * wide, T(0));
    read_state(layout, tile, head, dc_last, T(0), rows.dc);
    read_state(layout, tile, head, dn_last, T(0), rows.dn);
    read_state(layout, tile, head, dh_last, T(0), rows.dh);
    const T* const own = recurrent + layout.at(tile.group, head, size * kGates);
    const Panels<T> panels = pack_transposed(own, size, scratch.take<T>(kGates * wide * wide));

    for (int64_t t = layout.length(tile.segments[0]) - 1; t >= 0; --t) {
      const int64_t live = live_rows(layout, tile, t, most);
      for (int64_t row = 0; row < live; ++row) retreat(tile.segments[row], t, head, row * wide, rows);
      if (t > 0 || dh0 != nullptr) multiply(live, rows.dgates, kGates * wide, panels, rows.dh, wide);
    }
    write_state(layout, tile, head, rows.dc, dc0);
    write_state(layout, tile, head, rows.dn, dn0);
    write_state(layout, tile, head, rows.dh, dh0);
  }

  // One row back through the token at step t.
  void retreat(int64_t segment, int64_t t, int64_t head, int64_t at, const Rows& rows) const {
    const int64_t size = layout.size, wide = padded<T>(size), token = layout.begin(segment) + t;
    const T* const now = saved + layout.at(token, head, kSavedRows);
    const T* const before = t > 0 ? saved + layout.at(token - 1, head, kSavedRows) : nullptr;
    const T* const c_before = before ? before + kMemory * size : c0 ? c0 + layout.at(segment, head) : nullptr;
    const T* const n_before = before ? before + kNormaliser * size : n0 ? n0 + layout.at(segment, head) : nullptr;
    const S* const dh_of_token = dh == nullptr ? nullptr : dh + layout.at(token, head);
    T* const dgates_of_token = dgates + layout.at(token, head, kGates);
    S* const stored = dgates_stored == nullptr ? nullptr : dgates_stored + layout.at(token, head, kGates);
    const int64_t back = layout.at(1, 0);
    for_each_vector<T>(size, [&](int64_t d, auto width) {
      for (const Saved row : {kGap, kForget, kCell, kOutput}) fetch(now - kSavedRows * back + row * size + d);
      for (const Saved row : {kMemory, kNormaliser}) fetch(now - 2 * kSavedRows * back + row * size + d);
      if (dh_of_token != nullptr) fetch(dh_of_token - back + d);
      const V gap = load(now + kGap * size + d, width), fgate = load(now + kForget * size + d, width);
      const V z = load(now + kCell * size + d, width), o = load(now + kOutput * size + d, width);
      const V c = load(now + kMemory * size + d, width);
      const V n = load(now + kNormaliser * size + d, width);  // 0 where no number is: see `cut`
      const V less = exp(gap > 0 ? -gap : gap), one = fill(T(1));
      const V i = gap >= 0 ? one : less, f = gap <= 0 ? one : less;
      V dh_now = load(rows.dh + at + d);
      if (dh_of_token != nullptr) dh_now += load(dh_of_token + d, width);
      const V slope = dh_now * (o / n), ratio = c / n;
      const V dc = load(rows.dc + at + d) + slope;
      const V dn = load(rows.dn + at + d) - slope * ratio;
      V through_f{};
      if (c_before != nullptr) through_f = dc * load(c_before + d, width) + dn * load(n_before + d, width);
      const auto give = [&](int64_t g, V dgate) {
        store(rows.dgates + kGates * at + g * wide + d, cut(dgate, width));
        store(dgates_of_token + g * size + d, dgate, width);
        if (stored != nullptr) store(stored + g * size + d, dgate, width);
      };
      give(0, (dc * z + dn) * i);
      give(1, through_f * f * sigmoid(-fgate));
      give(2, dc * i * (one - z * z));
      give(3, dh_now * o * ratio * (one - o));
      store(rows.dc + at + d, dc * f);
      store(rows.dn + at + d, dn * f);
    });
  }

  // dR and db of one gate of one head, all tokens of the group one after the other.
  void add_up(int64_t group, int64_t head, int64_t gate) const {
    const int64_t size = layout.size;
    Scratch scratch(2 * Scratch::bytes_of<T>(kTokensAtOnce * size));
    T* const h_rows = scratch.take<T>(kTokensAtOnce * size);
    T* const dgate_rows = scratch.take<T>(kTokensAtOnce * size);
    T* const to = drecurrent + layout.at(group, head, size * kGates) + gate * size;
    T* const to_bias = dbias == nullptr ? nullptr : dbias + layout.at(group, head, kGates) + gate * size;
    int64_t count = 0;
    const auto add_rows = [&] {
      gemm<T, true>(size, size, count, h_rows, 1, size, dgate_rows, size, to, kGates * size);
      if (to_bias != nullptr)
        for (int64_t row = 0; row < count; ++row)
          for (int64_t d = 0; d < size; ++d) to_bias[d] += dgate_rows[row * size + d];
      count = 0;
    };
    for (int64_t segment = layout.group_offsets[group]; segment < layout.group_offsets[group + 1]; ++segment)
      for (int64_t t = 0; t < layout.length(segment); ++t) {
        const int64_t token = layout.begin(segment) + t;
        const T* const dgate = dgates + layout.at(token, head, kGates) + gate * size;
        T* const h_row = h_rows + count * size;
        for (int64_t d = 0; d < size; d += 64 / static_cast<int64_t>(sizeof(T))) {
          fetch(hidden + layout.at(token + kTokensAhead, head) + d);
          fetch(dgate + layout.at(kTokensAhead, 0, kGates) + d);
        }
        if (t > 0)
          std::copy_n(hidden + layout.at(token - 1, head), size, h_row);
        else if (h0 != nullptr)
          std::copy_n(h0 + layout.at(segment, head), size, h_row);
        else
          std::fill_n(h_row, size, T(0));
        std::copy_n(dgate, size, dgate_rows + count * size);
        if (++count == kTokensAtOnce) add_rows();
      }
    if (count > 0) add_rows();
  }
};

// ---- Operators ----------------------------------------------------------------------------------------------------

Layout layout_of(const Tensor& recurrent, const Tensor& cu_seqlens, at::IntArrayRef group_offsets) {
  TORCH_CHECK(cu_seqlens.scalar_type() == at::kLong && cu_seqlens.is_contiguous(), "cu_seqlens must be int64 in a row");
  TORCH_CHECK(recurrent.dim() == 5 && recurrent.size(0) + 1 == static_cast<int64_t>(group_offsets.size()) &&
                  cu_seqlens.numel() == group_offsets.back() + 1,
              "recurrent, cu_seqlens and group_offsets do not agree");
  const int64_t* offsets = cu_seqlens.const_data_ptr<int64_t>();
  return {offsets[group_offsets.back()], recurrent.size(1), recurrent.size(2), offsets, group_offsets};
}

template <class T>
const T* checked(const OptionalTensor& x, at::IntArrayRef shape) {
  if (!x.has_value()) return nullptr;
  TORCH_CHECK(x->scalar_type() == kScalarType<T> && x->is_contiguous() && x->sizes() == shape, "expected a contiguous ",
              shape, " in the precision of the arithmetic, got ", x->sizes(), " ", x->scalar_type());
  return data<const T>(x);
}

// [N, H, 4, Dh] with rows of one run of memory each.
Tensor with_whole_rows(const Tensor& gates) {
  const int64_t size = gates.size(3);
  const bool whole = gates.stride(3) == 1 && gates.stride(2) == size && gates.stride(1) == kGates * size;
  return whole ? gates : gates.contiguous();
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// h [N, H, Dh]; c, n, m, h behind each segment [G, H, Dh] (G = 0 unless asked for); for the backward pass, unless
// `save` is false: the rows of `Saved` [N, H, 6, Dh], and h in the precision of the arithmetic where h itself is not.
ForwardResult slstm_forward(const Tensor& gates, const Tensor& recurrent, const OptionalTensor& bias,
                            const Tensor& cu_seqlens, at::IntArrayRef group_offsets, const OptionalTensor& c0,
                            const OptionalTensor& n0, const OptionalTensor& m0, const OptionalTensor& h0,
                            bool return_final_state, bool save) {
  const Layout layout = layout_of(recurrent, cu_seqlens, group_offsets);
  const int64_t tokens = layout.tokens, heads = layout.heads, size = layout.size, segments = layout.segments();
  TORCH_CHECK(gates.sizes() == at::IntArrayRef({tokens, heads, kGates, size}), "gates must be [N, H, 4, Dh]");
  const Tensor rows = with_whole_rows(gates);
  const at::TensorOptions core = core_options(gates);
  const bool narrow = gates.scalar_type() == at::kBFloat16;
  const int64_t finals = return_final_state ? segments : 0;
  const Tensor h = at::empty({tokens, heads, size}, gates.options());
  const Tensor c = at::empty({finals, heads, size}, core), n = at::empty({finals, heads, size}, core);
  const Tensor m = at::empty({finals, heads, size}, core), h_last = at::empty({finals, heads, size}, core);
  const Tensor saved = at::empty({save ? tokens : 0, heads, kSavedRows, size}, core);
  const Tensor hidden = at::empty({save && narrow ? tokens : 0, heads, size}, core);
  by_stored_type(gates, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const auto wanted = [](const Tensor& x, bool want) { return want ? data<T>(x) : nullptr; };
    const Forward<S> forward{layout,
                             data<const S>(rows),
                             rows.stride(0),
                             checked<T>(recurrent, {layout.groups(), heads, size, kGates, size}),
                             checked<T>(bias, {layout.groups(), heads, kGates, size}),
                             checked<T>(c0, {segments, heads, size}),
                             checked<T>(n0, {segments, heads, size}),
                             checked<T>(m0, {segments, heads, size}),
                             checked<T>(h0, {segments, heads, size}),
                             data<S>(h),
                             wanted(c, return_final_state),
                             wanted(n, return_final_state),
                             wanted(m, return_final_state),
                             wanted(h_last, return_final_state),
                             wanted(saved, save),
                             wanted(hidden, save && narrow)};
    const std::vector<Tile> tiles = tiles_of(layout);
    for_each_task(static_cast<int64_t>(tiles.size()) * heads,
                  [&](int64_t task) { forward.run(tiles[task / heads], task % heads); });
  });
  return {h, c, n, m, h_last, saved, hidden};
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of gates in `dtype`, and of R, bias, c0, n0 and h0 in the precision of the arithmetic; that of bias has
// E = 0 unless wanted, those of the state have G = 0 without a state. hidden is h in the precision of the arithmetic.
BackwardResult slstm_backward(const Tensor& recurrent, const Tensor& cu_seqlens, at::IntArrayRef group_offsets,
                              const OptionalTensor& c0, const OptionalTensor& n0, const OptionalTensor& h0,
                              const Tensor& saved, const Tensor& hidden, const OptionalTensor& dh,
                              const OptionalTensor& dc_last, const OptionalTensor& dn_last,
                              const OptionalTensor& dh_last, at::ScalarType dtype, bool bias_wanted) {
  const Layout layout = layout_of(recurrent, cu_seqlens, group_offsets);
  const int64_t tokens = layout.tokens, heads = layout.heads, size = layout.size, groups = layout.groups();
  const int64_t segments = layout.segments(), initial = c0.has_value() ? segments : 0;
  const at::TensorOptions core = core_options(saved);
  const bool narrow = dtype == at::kBFloat16;
  const Tensor dgates_core = at::empty({tokens, heads, kGates, size}, core);
  const Tensor dgates = narrow ? at::empty({tokens, heads, kGates, size}, core.dtype(dtype)) : dgates_core;
  const Tensor drecurrent = at::zeros(recurrent.sizes(), core);
  const Tensor dbias = at::zeros({bias_wanted ? groups : 0, heads, kGates, size}, core);
  const Tensor dc0 = at::empty({initial, heads, size}, core), dn0 = at::empty({initial, heads, size}, core);
  const Tensor dh0 = at::empty({initial, heads, size}, core);
  by_stored_type(dgates, [&](auto stored) {
    using S = decltype(stored);
    using T = ComputeType<S>;
    const auto wanted = [](const Tensor& x, bool want) { return want ? data<T>(x) : nullptr; };
    const Backward<S> backward{layout,
                               checked<T>(recurrent, {groups, heads, size, kGates, size}),
                               checked<T>(c0, {segments, heads, size}),
                               checked<T>(n0, {segments, heads, size}),
                               checked<T>(h0, {segments, heads, size}),
                               checked<T>(saved, {tokens, heads, kSavedRows, size}),
                               checked<T>(hidden, {tokens, heads, size}),
                               checked<S>(dh, {tokens, heads, size}),
                               checked<T>(dc_last, {segments, heads, size}),
                               checked<T>(dn_last, {segments, heads, size}),
                               checked<T>(dh_last, {segments, heads, size}),
                               data<T>(dgates_core),
                               narrow ? data<S>(dgates) : nullptr,
                               data<T>(drecurrent),
                               wanted(dbias, bias_wanted),
                               wanted(dc0, c0.has_value()),
                               wanted(dn0, c0.has_value()),
                               wanted(dh0, c0.has_value())};
    const std::vector<Tile> tiles = tiles_of(layout);
    for_each_task(static_cast<int64_t>(tiles.size()) * heads,
                  [&](int64_t task) { backward.run(tiles[task / heads], task % heads); });
    for_each_task(groups * heads * kGates, [&](int64_t task) {
      backward.add_up(task / kGates / heads, task / kGates % heads, task % kGates);
    });
  });
  return {dgates, drecurrent, dbias, dc0, dn0, dh0};
}

}  // namespace

TORCH_LIBRARY_IMPL(moxe, CPU, m) {
  m.impl("slstm_cpu", &slstm_forward);
  m.impl("slstm_cpu_backward", &slstm_backward);
}

}  // namespace moxe

// One token of the sLSTM cell, for as many channels as a vector has lanes; the equations are those of reference.py.
#pragma once

#include "cpu/vector.h"

namespace moxe {

// The memory behind a token, and what the backward pass needs: gap = i~ - (log sigmoid(f~) + m_{t-1}), tanh(z~) and
// sigmoid(o~).
template <class V>
struct SLSTMCell {
  V c, n, m, h, gap, z, o;
};

template <class V>
inline SLSTMCell<V> advance_cell(V igate, V fgate, V zgate, V ogate, V c_before, V n_before, V m_before) {
  const V one = V{} + 1, z = tanh(zgate);
  const V kept = log_sigmoid(fgate) + m_before, gap = igate - kept;
  const V less = exp(gap > 0 ? -gap : gap);
  const V i = gap >= 0 ? one : less, f = gap <= 0 ? one : less;
  const V c = f * c_before + i * z, n = f * n_before + i;
  // sigmoid(o~) = n part and sigmoid(o~) c / n = c part, with one division.
  const V part = one / (n + n * exp(-ogate));
  return {c, n, maximum(kept, igate), c * part, gap, z, n * part};
}

}  // namespace moxe

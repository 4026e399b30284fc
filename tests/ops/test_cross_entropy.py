"""The chunked head and loss against torch's own, which holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moxe.ops import cross_entropy
from moxe.ops.cross_entropy import linear_cross_entropies, linear_cross_entropy

VOCABULARY = 43  # whole vectors and a rest, whatever the width of the machine's vectors


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def problem(rows: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(rows, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, 6, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (rows,))
    targets[::4] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [0, 1, 5, 23])
@pytest.mark.parametrize("entries", [1, 11, 40, 1 << 22])
def test_the_loss_and_its_gradients_are_those_of_all_logits_at_once(
    rows: int, entries: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_ENTRIES_AT_ONCE", entries)
    hidden, weight, targets = problem(rows)
    loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(3 * expected, (hidden, weight)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entries", [40, 1 << 22])
def test_the_loss_of_each_row_comes_with_the_sum_and_has_no_gradient(
    entries: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_ENTRIES_AT_ONCE", entries)
    hidden, weight, targets = problem(23, dtype)
    loss, losses = linear_cross_entropies(hidden, weight, targets, backend=backend)
    expected = F.cross_entropy((hidden @ weight.T).to(losses.dtype), targets, reduction="none")
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(losses, expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(losses.sum(), loss)
    assert losses.dtype == loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.requires_grad
    assert not losses.requires_grad
    assert (losses[targets == -100] == 0).all()
    with torch.no_grad():
        assert torch.equal(linear_cross_entropies(hidden, weight, targets, backend=backend)[1], losses)


def test_rows_without_any_target_give_a_loss_and_gradients_of_exactly_zero(backend: str) -> None:
    hidden, weight, targets = problem(9)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), backend=backend)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_logits_far_outside_the_range_of_exp_stay_finite(backend: str) -> None:
    hidden, weight, targets = problem(7, torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, targets, backend=backend)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


def test_under_autocast_only_the_products_are_bfloat16(backend: str) -> None:
    hidden, weight, targets = problem(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), rtol=2e-2, atol=0)


def test_a_frozen_head_gets_no_gradient(backend: str) -> None:
    hidden, weight, targets = problem(9)
    linear_cross_entropy(hidden, weight.detach(), targets, backend=backend).backward()
    assert hidden.grad is not None


def test_without_gradients_none_is_computed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = problem(9)
    expected = linear_cross_entropy(hidden, weight, targets, backend=backend)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a buffer for a gradient was made")

    monkeypatch.setattr(torch, "zeros_like", refuse)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, backend=backend) == expected


def test_targets_may_be_any_whole_numbers(backend: str) -> None:
    hidden, weight, targets = problem(9)
    expected = linear_cross_entropy(hidden, weight, targets, backend=backend)
    assert linear_cross_entropy(hidden, weight, targets.int(), backend=backend) == expected


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_a_target_outside_the_vocabulary_is_refused(backend: str, wrong: int) -> None:
    hidden, weight, targets = problem(9)
    targets[5] = wrong
    with pytest.raises(RuntimeError, match=r"out of bounds|outside the vocabulary"):
        linear_cross_entropy(hidden, weight, targets, backend=backend)

"""Which backend runs is decided by name, and `auto` says what it chose."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from moxe.ops import backend
from moxe.ops.backend import BACKENDS, resolve_backend
from moxe.ops.cpu import build


@pytest.fixture(autouse=True)
def no_earlier_choice() -> Iterator[None]:
    backend._choose.cache_clear()
    yield
    backend._choose.cache_clear()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_is_named_is_the_one_that_runs(name: str):
    assert resolve_backend(name, "cpu") == name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_cpp_on_a_processor_and_torch_elsewhere_and_says_so_once(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(build, "why_unavailable", lambda: None)
    choice = {"cpu": "cpu", "cuda": "torch"}[device]
    with caplog.at_level(logging.INFO, logger="moxe"):
        assert [resolve_backend("auto", device) for _ in range(3)] == [choice] * 3
    assert caplog.messages == [f"backend 'auto' is {choice!r} on {device}"]


def test_without_a_compiler_auto_is_torch_and_warns_once_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(build, "why_unavailable", lambda: "no compiler was found: install one")
    assert [resolve_backend("auto", "cpu") for _ in range(3)] == ["torch"] * 3
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "backend 'auto' is 'torch', which is slower here: no compiler was found: install one")
    ]


def test_without_a_compiler_the_cpu_backend_fails_and_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "why_unavailable", lambda: "no compiler was found: install one")
    with pytest.raises(ValueError, match="no compiler was found: install one"):
        resolve_backend("cpu", "cpu")


def test_the_cpu_backend_is_refused_on_another_device():
    with pytest.raises(ValueError, match="backend='cpu' is for tensors on the CPU, not on 'cuda'"):
        resolve_backend("cpu", "cuda")


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="backend='fast' is not one of: auto, reference, torch, cpu"):
        resolve_backend("fast", "cpu")

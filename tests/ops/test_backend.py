"""Which backend runs is decided by name, and `auto` says what it chose."""

from __future__ import annotations

import logging

import pytest

from moxe.ops import backend
from moxe.ops.backend import BACKENDS, resolve_backend


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_is_named_is_the_one_that_runs(name: str):
    assert resolve_backend(name, "cpu") == name


def test_auto_says_its_choice_once_for_a_device(caplog: pytest.LogCaptureFixture):
    backend._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moxe"):
        assert [resolve_backend("auto", "cpu") for _ in range(3)] == ["torch"] * 3
    assert caplog.messages == ["backend 'auto' is 'torch' on cpu"]


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="backend='fast' is not one of: auto, reference, torch"):
        resolve_backend("fast", "cpu")

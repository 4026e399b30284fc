"""The implementations that an op beside the cells has."""

from __future__ import annotations

import pytest

from moxe.ops.cpu import build


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Its name; a machine without a compiler skips C++ and says why."""
    if request.param == "cpu" and (reason := build.why_unavailable()):
        pytest.skip(reason)
    return request.param

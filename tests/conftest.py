"""One thread, the same examples in every run, and memory that is poisoned on request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from moxe.ops.cpu import build

# Which examples run does not depend on the day, and a slow machine is not a failure.
settings.register_profile("moxe", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("hunt", derandomize=False, deadline=None, max_examples=3000)  # --hypothesis-profile=hunt
settings.load_profile("moxe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is tried on the backend `cpu` is skipped, visibly, where there is no compiler."""
    on_cpu_backend = [item for item in items if any(part.startswith("cpu") for part in _parameters(item))]
    if on_cpu_backend and (reason := build.why_unavailable()):
        for item in on_cpu_backend:
            item.add_marker(pytest.mark.skip(reason=reason))


def _parameters(item: pytest.Item) -> list[str]:
    callspec = getattr(item, "callspec", None)
    return callspec.id.split("-") if callspec else []


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on many threads, and sums come out alike on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised is filled with NaN (integers: their largest value)."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)

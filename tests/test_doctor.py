"""`moxe doctor` finds every backend right here, and notices one that is not."""

from __future__ import annotations

import pytest
import torch

from moxe import doctor
from moxe.cli import main
from moxe.doctor import LARGEST_ERROR, diagnose
from moxe.ops.cpu import build


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_every_backend_that_is_here_is_right(backend: str):
    (found,) = [diagnosis for diagnosis in diagnose() if (diagnosis.backend, diagnosis.device) == (backend, "cpu")]
    assert found.unavailable is None
    assert len(found.errors) == 2 * len(doctor.CHECKS)
    assert found.is_right
    assert 0 < max(found.errors.values()) < LARGEST_ERROR


@pytest.mark.parametrize("wrong", [1e-6, torch.nan])
def test_a_wrong_backend_is_named_and_the_exit_code_is_1(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    right = doctor.CHECKS["sLSTM"]

    def check(backend: str, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        outputs, gradients = right(backend, device)
        return outputs, [gradients[0] + wrong * (backend == "torch"), *gradients[1:]]

    monkeypatch.setattr(doctor, "CHECKS", {"sLSTM": check})
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "backend 'torch' on cpu  WRONG" in printed


def test_a_backend_that_is_not_here_is_shown_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(build, "why_unavailable", lambda: "no compiler: install one")
    monkeypatch.setattr(doctor, "CHECKS", {"mLSTM": doctor.CHECKS["mLSTM"]})
    assert main(["doctor"]) == 0
    assert "backend 'cpu' on cpu\n  not here: no compiler: install one" in capsys.readouterr().out

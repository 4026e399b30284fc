"""What is said about the machine, and that a measurement leaves the process as it was."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from moxe.benchmarks.machine import arithmetic, available_memory, describe_machine, peak_memory


def test_the_machine_is_described_by_what_decides_a_speed():
    machine = describe_machine(threads=3)
    assert machine["threads"] == 3
    assert machine["torch"] == torch.__version__
    assert machine["cpu"]
    assert machine["date"].startswith("20")
    assert {"cores", "transformers", "moxe", "memory_bytes", "environment", "backend"} <= machine.keys()
    json.dumps(machine)


@pytest.mark.parametrize("precision", ["fp32", "fp32 medium", "bf16"])
def test_a_precision_holds_inside_its_block_and_nowhere_else(precision):
    before = torch.get_float32_matmul_precision()
    with arithmetic(precision):
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
        assert torch.get_float32_matmul_precision() == ("medium" if precision == "fp32 medium" else before)
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_autocast_enabled("cpu")


def test_peak_memory_sees_what_was_taken_and_freed_again_but_not_what_the_starter_holds():
    held = b"x" * 300_000_000
    program = (
        "from moxe.benchmarks.machine import peak_memory; before = peak_memory(); "
        "taken = b'x' * 200_000_000; del taken; print(before, peak_memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, taken = map(int, done.stdout.split())
    assert 150e6 < taken < 300e6
    assert peak_memory() > len(held)
    assert before < 2 * (available_memory() or before)

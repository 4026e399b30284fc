"""Peak memory of two training steps of one side, in a process that does nothing else.

`python -m moxe.benchmarks.peak_memory JOB` prints the bytes that building the model and two steps took beyond what the
imports had taken. JOB is a JSON object: side, model (settings of our configuration), rows, length, setting (see
`peers.Setting`), tuned (whether to tune the allocator), threads.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from moxe.benchmarks import peers
from moxe.benchmarks.machine import peak_memory, tune_allocator
from moxe.benchmarks.training import training_step
from moxe.models.configuration_moxe import MoxEConfig


def measure_peak_memory(job: dict[str, Any]) -> int:
    """Bytes of the job described above; right only in a fresh process."""
    torch.set_num_threads(job["threads"])
    if job["tuned"]:
        tune_allocator()
    if job["side"] in peers.OFFICIAL:
        peers.official_package()
    config, setting = MoxEConfig(**job["model"]), peers.Setting(**job["setting"])
    before = peak_memory()
    trainee = peers.build(job["side"], config, job["length"], setting)
    step = training_step(trainee, setting, job["rows"], job["length"], config.vocab_size)
    step()
    step()
    return peak_memory() - before


if __name__ == "__main__":
    print(measure_peak_memory(json.loads(sys.argv[1])))

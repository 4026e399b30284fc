"""Where the time of a training step goes, by operation.

    python benchmarks/profile_step.py [--backend auto|cpu|torch] [--bf16] [--threads N] [--json FILE]
    python benchmarks/profile_step.py --device cuda --bf16

Model and batch are by default those of `moxe bench training`: 18M parameters without embeddings, vocabulary 8,192,
B 8, S 256. Times are each operation's own, without what it calls; on a GPU those of its kernels.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moxe.models.configuration_moxe import MoxEConfig
from moxe.models.modeling_moxe import MoxEForCausalLM
from moxe.ops.cpu.allocator import keep_freed_memory

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 products by autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--default-allocator", action="store_true", help="memory may go back to the system every step")
    parser.add_argument("--time-only", action="store_true", help="no profile, which is slow where kernels are many")
    parser.add_argument("--rows", type=int, default=30, help="operations to print")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.default_allocator:
        keep_freed_memory()

    torch.manual_seed(0)
    config = MoxEConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        backend=arguments.backend,
    )
    model = MoxEForCausalLM(config).train()
    torch.nn.Module.to(model, arguments.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (arguments.batch, arguments.length), device=arguments.device)
    on_gpu = ids.is_cuda

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=arguments.bf16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(2):
        step()
    seconds = []
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) // len(seconds)
    print(f"a step takes {median * 1e3:.0f} ms ({ids.numel() / median:,.0f} tokens/s), {faults:,} page faults")
    if on_gpu:
        print(f"{torch.cuda.get_device_name()}: {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB at most")
    if arguments.time_only:
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()

    milliseconds, calls = Counter(), Counter()
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        milliseconds[event.key] += spent / 1e3 / STEPS
        calls[event.key] += event.count // STEPS
    total = sum(milliseconds.values())
    print(f"under the profiler {total:.0f} ms")
    print(f"{'operation':<52}{'ms':>9}{'share':>8}{'calls':>8}")
    for name, spent in milliseconds.most_common(arguments.rows):
        print(f"{name[:51]:<52}{spent:>9.1f}{spent / total:>8.1%}{calls[name]:>8}")
    print(f"{'all':<52}{total:>9.1f}{1:>8.1%}{sum(calls.values()):>8}")
    if arguments.json:
        record = {
            "setting": {key: str(value) for key, value in vars(arguments).items() if key != "json"},
            "torch": torch.__version__,
            "step_seconds": seconds,
            "operations": [
                {"name": name, "milliseconds": round(spent, 3), "calls": calls[name]}
                for name, spent in milliseconds.most_common()
            ],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

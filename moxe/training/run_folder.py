"""The folder of a run: what may be written where, and what a resumed run finds.

Every file appears whole or not at all: it is written beside its place and then moved there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moxe
from moxe.errors import UserError
from moxe.recipe import Recipe, load_recipe

# Settings of the data section that change neither the tokens nor their order.
_WITHOUT_EFFECT = {"cache_dir"}
# Settings of the training section that decide which rows a step sees.
_DECIDE_WHAT_IS_SEEN = {"seed", "batch_size", "gradient_accumulation_steps"}


class RunFolder:
    """`<output_dir>/<name>/` of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.run_dir
        self.recipe_path = self.path / "recipe.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.evaluation_path = self.path / "evaluation.json"
        self.plots_path = self.path / "plots"

    def check(self, recipe: Recipe) -> Path | None:
        """Find out whether the folder can take a run of `recipe`; writes nothing.

        Returns:
            The checkpoint to go on from, or None to start from step 0.

        Raises:
            UserError: if the folder holds a run and `training.resume` is not set; or if it is to be resumed with
                another model, other data, or another order or grouping of the data.
        """
        checkpoint = self.last_checkpoint()
        if recipe.training.resume:
            if checkpoint is not None:
                self._refuse_other_run(recipe)
        elif self.evaluation_path.exists():
            raise UserError(f"{self.path} already holds a finished run: choose another --training.name")
        elif checkpoint is not None:
            raise UserError(
                f"{self.path} holds a run that stopped after {checkpoint.name}: go on with --training.resume true, or "
                "choose another --training.name"
            )
        return checkpoint

    def make(self) -> None:
        """Make the folder.

        Raises:
            UserError: if it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be made: {error.strerror}") from None

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step that is complete: its trainer_state.json is what is written last."""
        complete = [path.parent for path in self.path.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
        return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)

    def _refuse_other_run(self, recipe: Recipe) -> None:
        before, now = load_recipe(self.recipe_path).to_dict(), recipe.to_dict()
        compared = {section: before[section].keys() & now[section].keys() for section in ("model", "data")}
        compared["training"] = _DECIDE_WHAT_IS_SEEN
        for section, keys in compared.items():
            for key in sorted(keys - _WITHOUT_EFFECT):
                if before[section][key] != now[section][key]:
                    raise UserError(
                        f"{self.path} cannot be resumed with {section}.{key}={now[section][key]!r}: the run was "
                        f"started with {before[section][key]!r}"
                    )

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def write_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """model.safetensors, config.json, generation_config.json, tokenizer.json and tokenizer_config.json."""
        temporary = Path(tempfile.mkdtemp(prefix=".model-", dir=self.path))
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for file in temporary.iterdir():
                os.replace(file, self.path / file.name)
        finally:
            shutil.rmtree(temporary)

    def write_versions(self, device: str) -> None:
        """versions.json: what the run was made with, and on what machine."""
        packages = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
        versions = {
            "python": platform.python_version(),
            "moxe": moxe.__version__,
            "git_commit": _git_commit(),
            **{package: _version(package) for package in packages},
            "platform": platform.platform(),
            "cpu": _cpu_name(),
            "cpu_count": os.cpu_count(),
            "device": device,
        }
        self.write_json(self.path / "versions.json", versions)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that moxe runs from; None when it is installed elsewhere."""
    root = Path(moxe.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    """The model name that Linux gives; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

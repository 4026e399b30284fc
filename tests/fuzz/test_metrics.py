"""Lines of metrics.jsonl of any content: each is refused in one sentence, or shown without breaking a terminal."""

from __future__ import annotations

import io
import json
import math
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from moxe.errors import UserError
from moxe.observability.follow import RunState
from moxe.observability.live import plain_line, view
from moxe.observability.metrics import parse_line

NAMES = [
    "step", "epoch", "tokens", "learning_rate", "loss", "lm_loss", "x_loss", "gradient_norm", "gradient_norms",
    "skipped_steps", "tokens_per_second", "layers", "validation_loss", "validation_lm_loss", "validation_layers",
    "x\x1b[31m_loss", "x\n_loss", "validation_\x1b_loss", "x\ud800_loss", "",
]  # fmt: skip
numbers = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from([0, 1, 2, 2**63 - 1, 2**63, 10**400, -(10**400), 1e-320, 1e308, -1e308, math.inf, math.nan]),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=4)),
    lambda inside: st.one_of(st.lists(inside, max_size=3), st.dictionaries(st.text(max_size=4), inside, max_size=3)),
    max_leaves=5,
)
routings = st.fixed_dictionaries(
    {
        "load": st.one_of(st.lists(numbers, min_size=2, max_size=6), anything),
        "difficulty_mean": st.one_of(st.none(), numbers, anything),
        "difficulty_variance": st.one_of(st.none(), numbers),
        "router_entropy": numbers,
        "mlstm_share": numbers,
    }
)
# Most of them right, so that what is behind the check is reached.
records = st.builds(
    lambda step, right, layers, other: {"step": step, **right, "layers": layers, **other},
    st.one_of(st.integers(1, 2**62), numbers),
    st.dictionaries(st.sampled_from([*NAMES[1:8], *NAMES[9:11]]), numbers),
    st.lists(routings, max_size=3),
    st.one_of(st.just({}), st.dictionaries(st.sampled_from(NAMES), st.one_of(numbers, anything), max_size=2)),
)
recipes = st.fixed_dictionaries(
    {
        "training": st.fixed_dictionaries({"max_steps": st.one_of(st.just(-1), numbers), "num_epochs": numbers}),
        "model": st.dictionaries(
            st.sampled_from(["gamma", "group_loss_coef", "load_balancing", "difficulty_loss_coef"]), anything
        ),
    }
)
LAYER = {"load": [1.0, 0.0], "difficulty_mean": 1.0, "difficulty_variance": 0.0, "router_entropy": 0.0,
         "mlstm_share": 1.0}  # fmt: skip
BY_EPOCH = {"training": {"max_steps": -1, "num_epochs": 1.0}}


@given(lines=st.lists(st.one_of(records, st.dictionaries(st.text(), anything)), max_size=4), recipe=recipes)
@example(lines=[{"step": 0}], recipe={"training": {"max_steps": 9}})
@example(lines=[{"step": 1, "tokens": 1, "tokens_per_second": 1.0}], recipe={"training": {"max_steps": 10**400}})
@example(lines=[{"step": 1, "epoch": math.nan}], recipe=BY_EPOCH)
@example(lines=[{"step": 1, "epoch": 1e-320}], recipe=BY_EPOCH)
@example(lines=[{"step": 1, "epoch": 10**400}], recipe=BY_EPOCH)
@example(lines=[{"step": 1, "epoch": 1e300}], recipe=BY_EPOCH)
@example(lines=[{"step": 1, "loss": 10**400}], recipe={})
@example(lines=[{"step": 1, "loss": 1.0, "validation_loss": 2.0, "x_loss": 3.0}], recipe={})
@example(lines=[{"step": 1, "x\x1b[31m_loss": 1.0}], recipe={})
@example(lines=[{"step": 1, "layers": [{**LAYER, "difficulty_mean": ""}]}], recipe={})
@example(lines=[{"step": 1, "layers": [{**LAYER, "load": [10**308, 0]}]}], recipe={})
@example(
    lines=[{"step": step, "layers": [LAYER]} for step in (60, 120)],
    recipe={"model": {"group_loss_coef": 10**400, "load_balancing": "\x1b", "difficulty_loss_coef": "\x1b"}},
)
def test_any_line_is_refused_in_one_sentence_or_shown(lines: list[dict[str, Any]], recipe: Any):
    state = RunState("run", recipe)
    for record in lines:
        try:
            read = parse_line(json.dumps(record), "here")
            warnings = state.add(read, "here")
        except UserError:
            continue
        assert all(text.isprintable() for text in (plain_line(read, state.max_steps), *warnings))
        for width, height in ((80, 24), (30, 8)):
            output = io.StringIO()
            Console(file=output, width=width, height=height, color_system=None).print(view(state, width, height))
            shown = output.getvalue().splitlines()
            assert len(shown) <= height
            assert all(line.isprintable() and len(line) <= width for line in shown)

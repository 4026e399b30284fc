"""Every question answers, on sizes far too small to say anything about speed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moxe.benchmarks import QUESTIONS, cells, checks, decoding, floor, length, peers, skew, training, worker
from moxe.benchmarks.plots import draw_report
from moxe.benchmarks.report import CheckFailed, Report

TINY = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 1}
TRAINING = training.Sizes(
    TINY, (training.Comparison(1, 16, ("moxe", "xlstm", "qwen", "gemma")),), seconds_a_side=0.1, memory_of=()
)
DECODING = replace(decoding.QUICK, model=TINY, contexts=(16, 64), longest_of_peers=64, really_read=32, chunk=10)


@pytest.fixture(autouse=True)
def untouched_allocator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "tune_allocator", lambda: True)


def without_official(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_available", lambda side: side not in peers.OFFICIAL)


def assert_answered(report: Report) -> None:
    assert report.failed is None
    assert "relative error" in report.check
    assert report.figures
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert all(sample >= 0 for figure in report.figures for sample in figure.samples)


@pytest.mark.parametrize("setting", training.SETTINGS)
def test_training_compares_every_side_and_shows_the_one_it_could_not_measure(monkeypatch, setting):
    without_official(monkeypatch)
    report = training.measure(TRAINING, repeats=1, setting=setting)
    assert_answered(report)
    by_model = {row[2]: row for row in report.rows}
    assert list(by_model) == ["MoxE", "xLSTM[5:1]", "Qwen1.5-MoE", "Gemma 2"]
    assert by_model["xLSTM[5:1]"][3] == peers.NOT_MEASURED
    assert float(by_model["Qwen1.5-MoE"][6]) > 0
    trials = [figure for figure in report.figures if figure.about["setting"] == "trial"]
    assert bool(trials) == (setting == "best")
    # The setting that is kept is the fastest of those that were tried.
    for figure in report.figures:
        tried = {trial.about["ran_in"]: trial.median for trial in trials if trial.side == figure.side}
        if figure.about["setting"] == "best":
            assert figure.about["ran_in"] == min(tried, key=lambda name: tried[name])


def test_training_measures_memory_in_a_process_of_its_own():
    job = {"side": "moxe", "model": TINY, "rows": 1, "length": 16, "setting": {"precision": "fp32"}}
    taken = training.run_memory_process({**job, "tuned": False, "threads": 1})
    weights = 4 * sum(p.numel() for p in peers.build("moxe", TRAINING.config, 16, peers.Setting()).model.parameters())
    assert 3 * weights < taken < 1e9  # weights, and AdamW's two moments


def test_a_memory_process_that_dies_is_said():
    job = {"side": "qwen", "model": {"hidden_size": -1}, "rows": 1, "length": 16, "setting": {}}
    with pytest.raises(
        CheckFailed, match=r"the memory of Qwen1\.5-MoE could not be measured: ValueError: hidden_size=-1"
    ):
        training.run_memory_process({**job, "tuned": False, "threads": 1})


def test_a_peer_that_cannot_run_in_a_setting_is_noted_and_another_setting_taken(monkeypatch):
    step = training.training_step

    def broken(trainee, setting, *shape):
        if setting.precision == "bf16" and type(trainee.model).__name__.startswith("Gemma"):
            raise RuntimeError("no kernel for this")
        return step(trainee, setting, *shape)

    monkeypatch.setattr(training, "training_step", broken)
    sizes = replace(TRAINING, comparisons=(training.Comparison(1, 16, ("moxe", "gemma")),))
    report = training.measure(sizes, repeats=1, setting="best")
    assert_answered(report)
    assert "Gemma 2 does not run in bf16: no kernel for this" in report.notes
    assert next(row for row in report.rows if row[2] == "Gemma 2")[3] == "fp32 medium"


def test_models_of_different_sizes_are_not_compared(monkeypatch):
    monkeypatch.setattr(peers, "PARAMETER_TOLERANCE", 0.0)
    with pytest.raises(CheckFailed, match="the models are not of one size"):
        training.measure(TRAINING, repeats=1, setting="plain")


def test_cells_are_compared_with_the_official_ones():
    pytest.importorskip("xlstm", reason="the official package is not installed")
    report = cells.measure(cells.QUICK, repeats=1)
    assert_answered(report)
    assert report.check.count("against the official cell") == 2
    assert [row[3] for row in report.rows] == ["MoxE", "official"] * 2
    assert all(float(row[6]) < 1e-4 for row in report.rows)


def test_cells_without_the_official_package_are_timed_alone(monkeypatch):
    without_official(monkeypatch)
    report = cells.measure(cells.QUICK, repeats=1)
    assert_answered(report)
    assert [row[4] for row in report.rows if row[3] == "official"] == [peers.NOT_MEASURED] * 2


def test_a_cell_that_does_not_fit_the_memory_is_measured_on_one_row(monkeypatch):
    without_official(monkeypatch)
    monkeypatch.setattr(cells, "available_memory", lambda: 1000)
    report = cells.measure(cells.Sizes((cells.Cell("mlstm", 2, 16, 2, 8),)), repeats=1)
    assert report.rows[0][1] == "1 x 16"
    assert report.notes == ["2 rows of 16 tokens do not fit this memory: measured on 1"]


def test_length_compares_as_many_tokens():
    report = length.measure(replace(length.QUICK, shapes=((2, 8), (1, 16))), repeats=1)
    assert_answered(report)
    assert [row[0] for row in report.rows] == ["2 x 8", "1 x 16"]
    assert report.rows[0][2] == "1.00"


def test_skew_is_skew_between_experts_and_not_between_kinds():
    sizes = replace(skew.FULL, rows=8, length=256)
    counts = [draw(sizes).flatten().bincount(minlength=8) for draw in (skew.balanced, skew.zipf)]
    balanced, zipf = (count / count.sum() for count in counts)
    assert balanced.max() < 0.15
    assert zipf.max() > 0.2
    assert zipf[:4].sum() == pytest.approx(0.5, abs=0.02)
    assert (zipf[:3] > zipf[1:4]).all()
    experts = skew.zipf(sizes)
    assert (experts[:, 0] != experts[:, 1]).all()


def test_skew_times_both():
    report = skew.measure(replace(skew.QUICK, length=8), repeats=1)
    assert_answered(report)
    assert [row[0] for row in report.rows] == ["balanced", "Zipf"]


def test_floor_sets_each_step_beside_its_products():
    report = floor.measure(replace(floor.QUICK, length=16), repeats=1)
    assert_answered(report)
    assert [row[0] for row in report.rows] == ["fp32", "fp32 medium", "bf16"]
    assert all(float(row[4].replace(",", "")) > 1 for row in report.rows)


def test_decoding_measures_every_side_and_our_state_behind_a_context_that_was_read():
    report = decoding.measure(DECODING, repeats=1)
    assert_answered(report)
    contexts = [(row[0], row[1], row[2]) for row in report.rows]
    assert ("64", "Gemma 2", "bf16") in contexts
    assert ("32", "MoxE (read in full)", "fp32") in contexts
    state = {f.median for f in report.figures if f.quantity == "carried bytes" and f.side == "MoxE"}
    assert len(state) <= 2  # one size a kind of weights, whatever the context
    qwen = [f.median for f in report.figures if f.quantity == "carried bytes" and f.side == "Qwen1.5-MoE"]
    assert qwen[2:] == [4 * size for size in qwen[:2]]
    assert len(report.notes) == 4


def test_a_filled_cache_is_as_large_as_one_that_was_read():
    config = training.QUICK.config
    for side in decoding.PEERS:
        model = decoding._model(side, config, "fp32")
        with torch.inference_mode():
            read = model(torch.zeros(1, 24, dtype=torch.int64), use_cache=True).past_key_values
            filled = decoding._filled_cache(model, 24)
        assert decoding.carried_bytes(filled) == decoding.carried_bytes(read)
        assert filled.get_seq_length() == 24


@pytest.mark.parametrize(
    ("theirs", "where"),
    [
        ({1: 1.0, 100: 3.0}, 10.0),  # half way in the logarithm
        ({1: 3.0, 100: 4.0}, 1.0),
        ({1: 1.0, 100: 1.5}, None),
        ({1: 3.0, 10: 1.0, 1000: 3.0}, 100.0),  # the last time counts
    ],
)
def test_the_crossing_is_where_the_peer_becomes_slower_for_good(theirs, where):
    ours = dict.fromkeys((1, 10, 100, 1000, 10000), 2.0)
    assert decoding.crossing(ours, theirs) == (None if where is None else pytest.approx(where))


@pytest.mark.parametrize("question", tuple(QUESTIONS))
def test_a_check_that_fails_leaves_no_figures(monkeypatch, question):
    def wrong(what: str, error: float, bound: float) -> str:
        raise CheckFailed(f"{what}: relative error 1")

    for module in (checks, cells, skew, decoding):
        monkeypatch.setattr(module, "require", wrong)
    setting = "plain" if question == "training" else None
    report = worker.answer(question, repeats=1, quick=True, setting=setting)
    assert report.failed is not None
    assert report.failed.endswith("relative error 1")
    assert not report.figures
    assert not report.rows


@pytest.mark.parametrize(("dtype", "by"), [("float64", 1e-6), ("float32", 0.1)])
def test_a_wrong_gradient_fails_the_check_of_the_model(dtype: str, by: float, monkeypatch):
    made = checks.tiny_model

    def wrong(backend: str, *arguments, **settings):
        model = made(backend, *arguments, **settings)
        if backend == "auto" and model.dtype == getattr(torch, dtype):
            model.lm_head.weight.data[0, 0] += by
        return model

    monkeypatch.setattr(checks, "tiny_model", wrong)
    with pytest.raises(CheckFailed, match=f"loss and gradients of a {dtype} model against the reference"):
        checks.check_model(length=5)


def test_a_result_that_is_not_finite_fails_every_check():
    nan = torch.tensor([1.0, float("nan")])
    assert checks.relative_error(nan, torch.ones(2)) == float("inf")
    assert checks.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    with pytest.raises(CheckFailed):
        checks.require("anything", float("nan"), 1.0)


def test_pictures_are_drawn_of_the_answers_that_have_one(monkeypatch, tmp_path):
    without_official(monkeypatch)
    for report in (
        training.measure(TRAINING, repeats=1, setting="plain"),
        cells.measure(cells.QUICK, repeats=1),
        decoding.measure(replace(DECODING, really_read=None), repeats=1),
    ):
        path = draw_report(report, tmp_path)
        assert path == tmp_path / f"{report.question}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
    assert draw_report(Report("skew", "Skew"), tmp_path) is None
    assert draw_report(Report("training", "Training", failed="wrong"), tmp_path) is None


def test_a_memory_process_that_takes_too_long_is_ended():
    job = {"side": "moxe", "model": TINY, "rows": 1, "length": 16, "setting": {}, "tuned": False, "threads": 1}
    with pytest.raises(CheckFailed, match="it took longer than 1 s"):
        training.run_memory_process(job, seconds=1)

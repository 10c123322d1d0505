"""The gradient noise scale: planted truths, what a run measures of it, and that measuring changes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.statistics.noise_scale import Moments as SampleMoments
from analysis.statistics.noise_scale import noise_scales
from harness.callbacks.diagnostics.gradient_noise import MOST_HALVES, Moments, halved_steps
from harness.callbacks.diagnostics.groups import groups_of, squares
from harness.config import RunConfig
from harness.data import MicroBatches
from harness.module import LanguageModel
from harness.record import DIAGNOSTIC_COLUMNS, RunFolder, read_rows
from harness.train import train
from tests.runs import tiny_run
from tests.test_train import EVERY_STEP, MACHINE, CrashError, act_in_micro_batch, crash, science_rows

NOISE = {"noise_scale": True}
ALL = dict.fromkeys(("noise_scale", "sharpness", "update_norms", "spectra"), True) | {"sharpness_tokens": 64}
WHOLE = MACHINE.model_copy(update={"max_micro_batch_tokens": 512})
GROUPS = {"all": (0, 1), "first": (0,)}

#: |G|² and tr Σ of a quadratic loss ½ (w − x)ᵀ A (w − x) at w, with x normal around 0 with covariance C:
#: the gradient of an example is A (w − x), so that G = A w and Σ = A C A.
A = torch.diag(torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64))
C = torch.diag(torch.tensor([2.0, 1.0, 4.0, 0.5], dtype=torch.float64))
W = torch.tensor([0.7, -0.5, 0.9, 0.4], dtype=torch.float64)
TRUE_SIGNAL, TRUE_NOISE = float((A @ W).square().sum()), float(torch.trace(A @ C @ A))


def quadratic_moments(steps: int, micro_batches: int, seed: int, unequal: bool = False) -> Moments:
    """Measure steps of batches of 32 examples in equal micro-batches; unequal: of 8 or 16 of them by turns."""
    generator = torch.Generator().manual_seed(seed)
    moments = Moments(torch.zeros(5, 2, dtype=torch.float64))
    for step in range(steps):
        parts = micro_batches * 2 if unequal and step % 2 else micro_batches
        examples = torch.randn(parts, 32 // micro_batches, 4, generator=generator, dtype=torch.float64) @ C.sqrt()
        of_parts = (W - examples.mean(dim=1)) @ A
        whole = of_parts.mean(dim=0)
        small = torch.stack([of_parts.square().sum(dim=1).mean(), of_parts[:, :2].square().sum(dim=1).mean()])
        big = torch.stack([whole.square().sum(), whole[:2].square().sum()])
        size = 32 // micro_batches
        moments.add(size, small, size * parts, big)
    return moments


def estimate(rows: list[dict[str, Any]], level: float) -> tuple[float, float, float]:
    names = ("num_steps", "signal", "noise", "signal_variance", "noise_variance", "signal_noise_covariance")
    value, low, high = noise_scales(SampleMoments(*(np.array([rows[0][name]], float) for name in names)), level)
    return float(value[0]), float(low[0]), float(high[0])


def test_moments_of_a_quadratic_are_its_gradient_and_covariance() -> None:
    whole, first = quadratic_moments(4000, 4, seed=0).rows("micro_batches", GROUPS)
    assert whole["signal"] == pytest.approx(TRUE_SIGNAL, rel=0.03)
    assert whole["noise"] == pytest.approx(TRUE_NOISE, rel=0.03)
    assert first["noise"] == pytest.approx(float(torch.trace((A @ C @ A)[:2, :2])), rel=0.03)
    assert whole["value"] == pytest.approx(TRUE_NOISE / TRUE_SIGNAL, rel=0.05)


def test_moments_of_batches_that_change_on_the_way_estimate_the_same() -> None:
    [whole, _] = quadratic_moments(4000, 4, seed=1, unequal=True).rows("micro_batches", GROUPS)
    assert whole["value"] == pytest.approx(TRUE_NOISE / TRUE_SIGNAL, rel=0.05)


def test_interval_covers_the_noise_scale_of_a_quadratic_as_often_as_it_says() -> None:
    hits = []
    for seed in range(400):
        _, low, high = estimate([*quadratic_moments(24, 4, seed).rows("micro_batches", GROUPS)], level=0.9)
        hits.append((np.isnan(low) or low < TRUE_NOISE / TRUE_SIGNAL) and not high < TRUE_NOISE / TRUE_SIGNAL)
    assert 0.86 <= np.mean(hits) <= 0.94


def test_moments_of_one_step_have_no_variance_and_infinite_gradients_no_value() -> None:
    [row, _] = quadratic_moments(1, 4, seed=2).rows("micro_batches", GROUPS)
    assert (row["num_steps"], row["signal_variance"]) == (1, None)
    broken = Moments(torch.full((5, 2), torch.inf, dtype=torch.float64), num_steps=3)
    assert next(broken.rows("ranks", GROUPS))["reason"] == "a gradient is not finite"


def test_halved_steps_end_at_each_mark_and_are_few() -> None:
    steps = halved_steps([4, 100, 101, 1000])
    assert {1, 2, 3, 4, 100, 101, 1000} <= steps
    for before, mark in ((0, 4), (4, 100), (100, 101), (101, 1000)):
        assert 1 <= sum(before < step <= mark for step in steps) <= MOST_HALVES


def test_groups_hold_every_tensor_once_by_kind(run: RunConfig) -> None:
    groups = groups_of(run.model)
    kinds = [name for name in groups if name not in ("all", "hidden")]
    assert sorted(place for kind in kinds for place in groups[kind]) == list(groups["all"])
    assert kinds[:2] == ["embedding", "norm"]
    assert {"attention.query", "mlp.up", "mlp.down", "head"} <= set(kinds)
    assert len(groups["mlp.up"]) == run.model.layers


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache)


def measured(text: Path, cache: Path, folder: Path, machine: Any, **diagnostics: Any) -> list[dict[str, Any]]:
    measuring = tiny_run(text, cache, diagnostics=diagnostics)
    assert train(measuring, machine, folder, cache) == "finished"
    return read_rows(RunFolder(folder).diagnostics, DIAGNOSTIC_COLUMNS)


def direct(run: RunConfig, cache: Path, size: int) -> tuple[float, float]:
    """Return the mean |G|² of parts of `size` sequences of the first batch, and |G|² of all of it, at the start."""
    from harness.batch_plan import plan_run
    from harness.corpus import prepare
    from harness.shards import open_shard

    module = LanguageModel(run)
    plan = plan_run(run.clock, run.model.sequence_length, 1, 512)
    batch = MicroBatches(open_shard(prepare(run.corpus, cache).folder, "train"), plan, run.data_seed)[0]

    def square(sequences: torch.Tensor) -> float:
        gradients = torch.autograd.grad(module.loss(sequences), list(module.network.parameters()))
        return float(squares(gradients).sum())

    return float(np.mean([square(part) for part in batch.split(size)])), square(batch)


@pytest.mark.parametrize(("machine", "estimator", "sequences"), [(MACHINE, "micro_batches", 4), (WHOLE, "halves", 8)])
def test_a_run_measures_what_gradients_taken_by_themselves_give(
    text: Path, cache: Path, tmp_path: Path, machine: Any, estimator: str, sequences: int
) -> None:
    evaluation = {"tokens": 2048, "first_mark_tokens": 512, "marks_per_doubling": 1}
    run = tiny_run(text, cache, evaluation=evaluation, diagnostics=NOISE)
    train(run, machine, tmp_path, cache)
    first = read_rows(RunFolder(tmp_path).diagnostics, DIAGNOSTIC_COLUMNS)[0]
    small, big = direct(run, cache, sequences)
    assert (first["step"], first["tokens_seen"], first["num_steps"]) == (1, 512, 1)
    assert (first["quantity"], first["group"]) == (f"noise_scale_{estimator}", "all")
    assert (first["small_batch_tokens"], first["big_batch_tokens"]) == (sequences * 32, 512)
    part = sequences / 16
    assert first["signal"] == pytest.approx((big - part * small) / (1 - part), rel=1e-3)
    assert first["noise"] == pytest.approx((small - big) / (1 / (sequences * 32) - 1 / 512), rel=1e-3)


def test_a_step_of_one_sequence_says_why_it_has_no_noise_scale(text: Path, cache: Path, tmp_path: Path) -> None:
    run = tiny_run(
        text,
        cache,
        diagnostics=NOISE,
        global_batch_tokens=32,
        token_budget=128,
        schedule={},
        evaluation={"tokens": 64, "first_mark_tokens": 64},
    )
    train(run, MACHINE, tmp_path, cache)
    rows = read_rows(RunFolder(tmp_path).diagnostics, DIAGNOSTIC_COLUMNS)
    assert rows
    assert {(row["group"], row["value"]) for row in rows} == {("all", None)}
    assert "one sequence" in str(rows[0]["reason"])


def test_diagnostics_change_neither_the_name_nor_a_bit_of_a_run(text: Path, cache: Path, tmp_path: Path) -> None:
    for machine in (MACHINE, WHOLE):
        plain, measuring = tiny_run(text, cache), tiny_run(text, cache, diagnostics=ALL)
        assert measuring.run_id == plain.run_id
        folders = [tmp_path / f"{name}{machine.max_micro_batch_tokens}" for name in ("plain", "measuring")]
        for each, folder in zip((plain, measuring), folders, strict=True):
            assert train(each, machine, folder, cache) == "finished"
        assert science_rows(folders[1]) == science_rows(folders[0])
        assert not RunFolder(folders[0]).diagnostics.exists()


def test_measurements_of_a_run_that_was_interrupted_are_those_of_one_that_was_not(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = measured(text, cache, tmp_path / "undisturbed", MACHINE, **ALL)
    run = tiny_run(text, cache, diagnostics=ALL)
    for micro_batch in (37, 30, 25):
        with monkeypatch.context() as patch:
            act_in_micro_batch(patch, micro_batch, crash)
            with pytest.raises(CrashError):
                train(run, EVERY_STEP, tmp_path / "disturbed", cache)
    assert measured(text, cache, tmp_path / "disturbed", EVERY_STEP, **ALL) == undisturbed


def test_marks_that_are_left_out_are_counted_from_the_last(text: Path, cache: Path, tmp_path: Path) -> None:
    rows = measured(text, cache, tmp_path, MACHINE, noise_scale=True, every_marks=3)
    assert sorted({row["step"] for row in rows}) == [4, 12, 32]  # of 4, 6, 8, 12, 16, 23, 32
    steps = {row["step"]: row["num_steps"] for row in rows if row["group"] == "all"}
    assert sum(steps.values()) == 32


def test_time_of_measuring_counts_as_evaluation(text: Path, cache: Path, tmp_path: Path) -> None:
    clocks = {}
    for name, diagnostics in (("plain", {}), ("measuring", ALL)):
        train(tiny_run(text, cache, diagnostics=diagnostics), MACHINE, tmp_path / name, cache)
        clocks[name] = json.loads(RunFolder(tmp_path / name).run.read_text())
    assert clocks["measuring"]["eval_seconds"] > 2 * clocks["plain"]["eval_seconds"]
    assert clocks["measuring"]["train_seconds"] < 2 * clocks["plain"]["train_seconds"]


def test_diagnostics_that_do_not_fit_are_refused(text: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match="sharpness_tokens 100 is not a whole number of sequences of 32 tokens"):
        tiny_run(text, cache, diagnostics={"sharpness": True, "sharpness_tokens": 100})
    with pytest.raises(ValueError, match="'noise' is not a key of diagnostics; did you mean 'noise_scale'"):
        tiny_run(text, cache, diagnostics={"noise": True})


def test_batches_that_grow_are_measured_as_they_are(text: Path, cache: Path, tmp_path: Path) -> None:
    stages = [{"until_tokens": 2048, "global_batch_tokens": 128}, {"until_tokens": 4096, "global_batch_tokens": 256}]
    run = tiny_run(text, cache, batch_warmup={"stages": stages}, diagnostics=NOISE)
    train(run, MACHINE, tmp_path, cache)
    rows = read_rows(RunFolder(tmp_path).diagnostics, DIAGNOSTIC_COLUMNS)
    whole = {(row["tokens_seen"], row["quantity"]): row["big_batch_tokens"] for row in rows if row["group"] == "all"}
    assert whole[2048, "noise_scale_halves"] == 128
    assert whole[4096, "noise_scale_micro_batches"] == 256
    assert whole[16_384, "noise_scale_micro_batches"] == 512


def test_a_run_may_be_measured_from_a_checkpoint_on(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 60, crash)
        with pytest.raises(CrashError):
            train(tiny_run(text, cache), EVERY_STEP, tmp_path, cache)
    measuring = tiny_run(text, cache, diagnostics=ALL)
    assert train(measuring, EVERY_STEP, tmp_path, cache) == "finished"
    rows = read_rows(RunFolder(tmp_path).diagnostics, DIAGNOSTIC_COLUMNS)
    assert sorted({row["step"] for row in rows}) == [16, 23, 32]

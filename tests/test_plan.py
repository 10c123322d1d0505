from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console, RenderableType

from harness.config import RunConfig
from harness.corpus import check_budget
from harness.flops import forward_backward_flops_per_token, optimizer_flops_per_step
from sweeps.grid import expand
from sweeps.plan import Plan, Speed, as_json, as_table, make_plan, measured_speed
from sweeps.spec import SweepSpec
from sweeps.sweep_file import preset_names, read_spec
from tests.sweep_examples import CORPUS, changed, prepared

UNKNOWN = Speed(None, "not measured")


def enough(_: RunConfig) -> None: ...


def plan_of(check: Callable[[RunConfig], None] = enough, speed: Speed = UNKNOWN, **keys: Any) -> Plan:
    spec = SweepSpec.parse(changed(**keys), source="small")
    return make_plan(spec, expand(spec, prepared), check, slots=2, speed=speed)


def test_plan_groups_runs_that_differ_in_rate_and_seed_alone() -> None:
    plan = plan_of(
        grid={"global_batch_tokens": [256, 1024], "seed": [0, 1]},
        optimizers={"adamw": {"learning_rate": [0.01, 0.02, 0.04]}},
        confirm={"seeds": [2, 3, 4], "top": 2},
    )
    assert [(r.work.global_batch_tokens, r.grid_runs, r.confirm_runs, r.peak_lrs) for r in plan.rows] == [
        (256, 6, 6, (0.01, 0.02, 0.04)),
        (1024, 6, 6, (0.01, 0.02, 0.04)),
    ]
    assert plan.runs == 24


def test_plan_counts_what_a_run_does() -> None:
    spec = SweepSpec.parse(changed(grid={"global_batch_tokens": [8192]}, token_budget=40000), source="small")
    adamw, muon = expand(spec, prepared)
    work = {row.work.optimizer: row.work for row in make_plan(spec, [adamw, muon], enough, 1, UNKNOWN).rows}
    assert (work["adamw"].steps, work["adamw"].realized_tokens) == (4, 32768)
    assert (work["adamw"].micro_batch_tokens, work["adamw"].accumulation) == (2048, 4)
    assert (work["adamw"].warmup_tokens, work["adamw"].warmup_share) == (8192, 0.25)
    per_token = forward_backward_flops_per_token(adamw.model)
    newton_schulz = 4 * optimizer_flops_per_step(muon.model, muon.optimizer)
    assert work["adamw"].train_flops == 32768 * per_token
    assert work["muon"].train_flops == pytest.approx(32768 * per_token + newton_schulz)
    assert work["muon"].optimizer_state_bytes < work["adamw"].optimizer_state_bytes


def test_plan_counts_evaluations_of_raw_and_averaged_weights() -> None:
    base = changed()["base"] | {"evaluation": {"tokens": 1024, "first_mark_tokens": 8192, "marks_per_doubling": 1}}
    raw = plan_of(base=base).rows[0].work
    averaged = plan_of(base=base | {"averaging": {"kind": "power_ema"}}).rows[0].work
    # at 0, 8192 and 16384 tokens; a forward pass is a third of forward and backward
    assert raw.evaluation_flops == pytest.approx(3 * 1024 / 3 * raw.train_flops / 16384)
    assert averaged.evaluation_flops == 2 * raw.evaluation_flops


def test_plan_has_hours_only_with_a_speed() -> None:
    plan = plan_of(speed=Speed(1e9, "as stated"))
    assert as_json(plan)["hours"] == pytest.approx(plan.flops / 1e9 / 2 / 3600)
    unknown = as_json(plan_of())
    assert (unknown["hours"], unknown["flops_per_second_source"]) == (None, "not measured")


def printed(table: RenderableType, width: int = 80) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_plan_fits_80_columns_with_every_number_whole() -> None:
    spec = read_spec("quickstart")
    plan = make_plan(spec, expand(spec, prepared), enough, 2, Speed(1e10, "as stated"))
    lines = printed(as_table(plan))
    assert lines[:3] == [
        "quickstart: 48 runs, then 16 confirmations",
        "Corpus: python-stdlib, tokenizer ascii of 128 tokens.",
        "Model: 115k, 115,136 parameters.",
    ]
    rows = {tuple(line.split()[:2]): line.split() for line in lines if line.startswith(("adamw", "muon"))}
    assert len(rows) == 8
    assert rows["muon", "16,384"] == [
        *("muon", "16,384", "6", "+", "2", "0.032,", "0.064,", "128", "2,097,152", "65,536", "(3%)"),
        *("2,048", "×", "8", "0.39"),
    ]  # fmt: skip
    assert not any("…" in line for line in lines)


def test_plan_names_the_model_in_the_rows_only_where_there_are_several() -> None:
    grid = {"global_batch_tokens": [256], "model.preset": ["115k", "5m"]}
    base = changed()["base"] | {"model": {"sequence_length": 64}}
    several = printed(as_table(plan_of(base=base, grid=grid)))
    assert sum(line.startswith("(5m)") for line in several) == 2
    assert not any("(115k)" in line for line in printed(as_table(plan_of())))


def test_speed_is_measured_on_finished_runs_alone() -> None:
    row = {"flops_per_token": 100.0, "optimizer_flops_per_step": 1000.0, "tokens_seen": 50, "step": 5}
    finished = row | {"status": "finished", "train_seconds": 4.0}
    running = dict.fromkeys(row) | {"status": "running", "train_seconds": None}
    assert measured_speed([running, finished, finished]).flops_per_second == 2 * (5000 + 5000) / 8
    assert measured_speed([running]).flops_per_second is None


def test_plan_refuses_every_batch_that_does_not_divide_over_the_devices() -> None:
    with pytest.raises(ValueError, match="does not divide") as caught:
        plan_of(grid={"global_batch_tokens": [192, 256, 320]}, machine={"devices": 2})
    first, second = str(caught.value).splitlines()
    assert first.startswith("global batch of 3 sequences (192 tokens) does not divide over 2 devices")
    assert second.startswith("global batch of 5 sequences (320 tokens) does not divide over 2 devices")


def test_plan_refuses_a_corpus_too_small_for_the_budget_beside_other_mistakes() -> None:
    with pytest.raises(ValueError, match="devices") as caught:
        plan_of(
            lambda run: check_budget(CORPUS, run), grid={"global_batch_tokens": [192]}, token_budget=2_000_000,
            machine={"devices": 2},
        )  # fmt: skip
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert any("the run needs 1999872 tokens" in line and "corpus.max_epochs allows 1" in line for line in lines)


def test_preset_budgets_are_those_that_are_promised() -> None:
    quickstart = make_plan(read_spec("quickstart"), expand(read_spec("quickstart"), prepared), enough, 2, UNKNOWN)
    cells = {(r.work.optimizer, r.work.global_batch_tokens): r for r in quickstart.rows}
    assert {batch: cells["adamw", batch].work.realized_tokens for _, batch in cells} == {
        256: 393_216, 1024: 524_288, 4096: 1_048_576, 16384: 2_097_152,
    }  # fmt: skip
    assert {batch: cells["adamw", batch].peak_lrs for _, batch in cells} == {
        256: (0.002, 0.004, 0.008), 1024: (0.004, 0.008, 0.016),
        4096: (0.006, 0.012, 0.024), 16384: (0.006, 0.012, 0.024),
    }  # fmt: skip
    assert {batch: cells["muon", batch].peak_lrs for _, batch in cells} == {
        256: (0.006, 0.012, 0.024), 1024: (0.012, 0.024, 0.048),
        4096: (0.024, 0.048, 0.096), 16384: (0.032, 0.064, 0.128),
    }  # fmt: skip
    assert {cells["muon", batch].work.warmup_tokens for _, batch in cells} == {16_384, 65_536}
    assert {(row.grid_runs, row.confirm_runs) for row in quickstart.rows} == {(6, 2)}
    assert {row.work.num_params for row in quickstart.rows} == {115_136}


@pytest.mark.parametrize(
    ("preset", "runs", "batches"),
    [
        ("equal-tokens", 36 + 12, {1024, 4096, 16384}),
        ("quickstart", 48 + 16, {256, 1024, 4096, 16384}),
        ("smoke", 16, {256, 1024, 4096, 16384}),
        ("warmup-sensitivity", 64, {256, 1024, 4096, 16384}),
    ],
)
def test_preset_can_be_planned(preset: str, runs: int, batches: set[int]) -> None:
    spec = read_spec(preset)
    plan = make_plan(spec, expand(spec, prepared), enough, 2, UNKNOWN)
    assert plan.runs == runs
    assert {row.work.global_batch_tokens for row in plan.rows} == batches
    assert spec.name == preset
    assert spec.description


def test_every_preset_is_in_the_table_above() -> None:
    assert preset_names() == ["equal-tokens", "quickstart", "smoke", "warmup-sensitivity"]


def test_equal_tokens_preset_gives_every_run_the_same_tokens_and_no_early_stop() -> None:
    runs = expand(read_spec("equal-tokens"), prepared)
    assert {(run.realized_tokens, run.stop_at_loss_nats) for run in runs} == {(524_288, None)}


def test_warmup_preset_has_one_step_against_four_at_the_largest_batch() -> None:
    runs = expand(read_spec("warmup-sensitivity"), prepared)
    assert {run.warmup_steps for run in runs if run.global_batch_tokens == 16384} == {1, 4}

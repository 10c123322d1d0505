import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from harness.config import RunConfig
from harness.corpus import check_budget
from harness.flops import forward_backward_flops_per_token, optimizer_flops_per_step
from harness.memory import activation_bytes_per_token
from harness.optimizers.config import OPTIMIZERS as REGISTRY
from sweeps.cli import main
from sweeps.grid import expand
from sweeps.plan import Plan, check_hours, make_plan
from sweeps.plan_view import as_json, as_table
from sweeps.spec import SweepSpec
from sweeps.speed import Speed, StepSeconds, measured_speeds
from sweeps.sweep_file import preset_names, read_spec
from tests.sweep_examples import CORPUS, changed, prepared
from tests.test_cli import text_sweep

UNKNOWN = Speed(None, "not measured")
OPTIMIZERS = ("adamw", "muon")


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
    assert work["muon"].checkpoint_bytes < work["adamw"].checkpoint_bytes
    memory = work["muon"].device_memory_bytes
    assert memory.parameters == memory.gradients == 4 * work["muon"].num_params
    assert work["muon"].checkpoint_bytes == memory.parameters + memory.optimizer_state
    assert memory.activations == work["muon"].micro_batch_tokens * activation_bytes_per_token(muon.model, "fp32")


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


TIMED = Speed(
    None,
    "timed",
    "a processor",
    {("115k", optimizer, "fp32", batch): StepSeconds(0.5, 0.25) for optimizer in OPTIMIZERS for batch in (256, 1024)},
)


def test_timed_steps_give_hours_step_by_step() -> None:
    base = changed()["base"] | {"evaluation": {"tokens": 1024, "first_mark_tokens": 8192, "marks_per_doubling": 1}}
    plan = plan_of(base=base, grid={"global_batch_tokens": [1024, 2048]}, machine={"max_micro_batch_tokens": 1024},
                   speed=TIMED)  # fmt: skip
    # 16 steps of one micro-batch, 8 of two; three evaluations of a micro-batch each, forward alone
    seconds = {row.work.global_batch_tokens: TIMED.seconds(row.work) for row in plan.rows}
    assert seconds == {1024: 16 * (0.5 + 0.25) + 3 * 0.5 / 3, 2048: 8 * (2 * 0.5 + 0.25) + 3 * 0.5 / 3}
    slot_hours = 2 * sum(each for each in seconds.values() if each) / 3600
    assert as_json(plan)["hours"] == pytest.approx(slot_hours / 2)
    assert "a processor: timed" in " ".join(printed(as_table(plan)))


def test_hours_are_not_known_unless_every_cell_is_timed_or_has_a_speed() -> None:
    untimed = {"grid": {"global_batch_tokens": [512, 1024]}}
    assert as_json(plan_of(speed=TIMED, **untimed))["hours"] is None
    both = plan_of(speed=replace(TIMED, flops_per_second=1e9), **untimed)
    by_batch = {row.work.global_batch_tokens: row for row in both.rows}
    assert both.slot_hours([by_batch[512]]) == pytest.approx(by_batch[512].flops / 1e9 / 3600)


def test_plan_compares_kinds_of_devices_and_counts_every_device() -> None:
    spec = SweepSpec.parse(changed(machine={"devices": 2}), source="small")
    others = [Speed(4e9, "as its profile says", "fast"), Speed(None, "its profile has no flops_per_second", "new")]
    plan = make_plan(spec, expand(spec, prepared), enough, 4, Speed(1e9, "as stated"), others)
    content = as_json(plan)
    hours = plan.flops / 1e9 / 3600
    assert (content["hours"], content["device_hours"]) == (pytest.approx(hours / 4), pytest.approx(2 * hours))
    assert [(each["device"], each["hours"]) for each in content["other_devices"]] == [
        ("fast", pytest.approx(hours / 16)),
        ("new", None),
    ]
    text = " ".join(printed(as_table(plan)))
    assert f"{2 * hours:.2f} device hours (1.00e+09 FLOP/s a slot: as stated)" in text
    assert "Hours: not known, new: its profile has no flops_per_second." in text


def test_budget_of_hours_is_refused_with_the_numbers() -> None:
    plan = plan_of(speed=Speed(1e6, "as stated"), machine={"devices": 2}, grid={"global_batch_tokens": [512, 1024]})
    hours = 2 * plan.flops / 1e6 / 3600
    check_hours(plan, hours * 1.01)
    with pytest.raises(ValueError, match="small: 4 runs take up to") as caught:
        check_hours(plan, hours * 0.99)
    assert f"{hours:.4g} device hours (1.00e+06 FLOP/s a slot: as stated)" in str(caught.value)
    assert f"--budget-hours is {hours * 0.99:g}; raise it, or lower token_budget" in str(caught.value)
    with pytest.raises(ValueError, match=r"its hours are not known \(not measured\)"):
        check_hours(plan_of(), 1e9)


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
        "Corpus: python-stdlib, tokenizer ascii, a vocabulary of 128 tokens.",
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


RUN_ROW = {"flops_per_token": 100.0, "optimizer_flops_per_step": 1000.0, "tokens_seen": 50, "step": 5}


def test_speed_is_measured_on_finished_runs_alone() -> None:
    finished = RUN_ROW | {"status": "finished", "train_seconds": 4.0, "device": "a"}
    running = dict.fromkeys(RUN_ROW) | {"status": "running", "train_seconds": None, "device": "a"}
    (speed,) = measured_speeds([running, finished, finished])
    assert (speed.device, speed.flops_per_second) == ("a", 2 * (5000 + 5000) / 8)
    (unknown,) = measured_speeds([running])
    assert not unknown.is_known
    slow = finished | {"train_seconds": 40.0, "device": "b"}
    assert [(each.device, each.flops_per_second) for each in measured_speeds([finished, slow])] == [
        ("a", 2500.0),
        ("b", 250.0),
    ]


def test_timed_steps_go_before_finished_runs_and_the_slowest_of_a_kind_counts() -> None:
    finished = RUN_ROW | {"status": "finished", "train_seconds": 4.0, "device": "other"}
    kind = {"device": "mine", "model": "115k", "optimizer": "muon", "precision": "fp32", "micro_batch_tokens": 256}
    timings = [
        kind | {"micro_batch_seconds": 0.5, "optimizer_seconds": 0.1},
        kind | {"micro_batch_seconds": 0.4, "optimizer_seconds": 0.3},
    ]
    mine, other = measured_speeds([finished, finished | {"device": "mine"}], timings)
    assert (mine.device, other.device) == ("mine", "other")
    assert mine.timed == {("115k", "muon", "fp32", 256): StepSeconds(0.5, 0.3)}
    assert mine.source == "steps timed by critbatch time, else measured on 1 finished run of this sweep"
    assert (mine.flops_per_second, other.timed) == (2500.0, {})


def test_plan_names_every_run_that_cannot_be() -> None:
    """Runs that differ in rate and seed alone are checked once, and named all."""
    checked = []

    def check(run: RunConfig) -> None:
        checked.append(run)
        if run.optimizer.name == "muon":
            raise ValueError("no")

    rates = {"adamw": {"learning_rate": [0.01]}, "muon": {"learning_rate": [0.01, 0.02, 0.04]}}
    with pytest.raises(ValueError, match=r"no \[115k-muon-b256-lr0.01-s0-\w+ and 5 more\]"):
        plan_of(check, optimizers=rates)
    assert len(checked) == 4


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


#: The presets: runs with confirmations, and batches.
PRESETS: dict[str, tuple[int, set[int]]] = {
    "branched-small": (174, {512, 1024, 1536, 2048, 3072, 4096, 6144, 8192}),
    "control-auxiliary": (36 + 36, {256, 1024, 4096, 16384}),
    "control-clipping": (48 + 48, {256, 1024, 4096, 16384}),
    "control-momentum": (24 + 24, {256, 1024, 4096, 16384}),
    "control-newton-schulz": (72 + 72, {256, 1024, 4096, 16384}),
    "equal-tokens": (36 + 12, {1024, 4096, 16384}),
    "optimizers-124m": (117 + 117, {262144, 1048576, 4194304}),
    "optimizers-small": (156 + 156, {256, 1024, 4096, 16384}),
    "quickstart": (48 + 16, {256, 1024, 4096, 16384}),
    "separate-small": (15, {512}),
    "smoke": (16, {256, 1024, 4096, 16384}),
    "telescope-small": (4 * 7 * 7, {1024}),
    "warmup-sensitivity": (64, {256, 1024, 4096, 16384}),
}


@pytest.mark.parametrize("preset", preset_names())
def test_preset_can_be_planned(preset: str) -> None:
    spec = read_spec(preset)
    plan = make_plan(spec, expand(spec, prepared), enough, 2, UNKNOWN)
    assert (plan.runs, {row.work.global_batch_tokens for row in plan.rows}) == PRESETS[preset]
    assert spec.name == preset
    assert spec.description


@pytest.mark.parametrize("preset", ["optimizers-small", "optimizers-124m"])
def test_arena_gives_every_optimizer_equally_many_trials_and_tokens(preset: str) -> None:
    runs = expand(read_spec(preset), prepared)
    cells = Counter((run.optimizer.name, run.global_batch_tokens, run.token_budget) for run in runs)
    assert {name for name, _, _ in cells} == REGISTRY.keys() - {"custom"}
    assert set(cells.values()) == {3}
    assert len({(batch, budget) for _, batch, budget in cells}) == len({batch for _, batch, _ in cells})


def test_equal_tokens_preset_gives_every_run_the_same_tokens_and_no_early_stop() -> None:
    runs = expand(read_spec("equal-tokens"), prepared)
    assert {(run.realized_tokens, run.stop_at_loss_nats) for run in runs} == {(524_288, None)}


def test_warmup_preset_has_one_step_against_four_at_the_largest_batch() -> None:
    runs = expand(read_spec("warmup-sensitivity"), prepared)
    assert {run.warmup_steps for run in runs if run.global_batch_tokens == 16384} == {1, 4}


def test_plan_command_compares_clusters_and_refuses_what_is_over_the_budget(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "critbatch" / "clusters").mkdir(parents=True)
    (tmp_path / "critbatch" / "clusters" / "fast.yaml").write_text("flops_per_second: 4.0e+9\n")
    sweep = text_sweep(tmp_path, text / "*.txt")
    of_gpus = ["--set", "machine.accelerator=gpu", "--set", "machine.devices=1"]  # planned where there are none
    command = ["plan", sweep, "--json", "--cluster", "fast", "--flops-per-second", "1e9", *of_gpus]
    assert main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    (here,) = plan["other_devices"]
    assert (plan["device"], plan["flops_per_second_source"]) == ("fast", "as its profile says")
    assert here["flops_per_second_source"] == "as stated"
    assert here["hours"] == pytest.approx(4 * plan["hours"])
    assert main([*command, "--budget-hours", f"{1.01 * plan['device_hours']}"]) == 0
    assert main([*command, "--budget-hours", f"{0.99 * plan['device_hours']}"]) == 2
    assert "device hours (fast: 4.00e+09 FLOP/s a slot: as its profile says)" in capsys.readouterr().err

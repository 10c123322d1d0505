"""`critbatch tune` on laboratories whose best rates are planted, and on a folder with planted training."""

import json
from pathlib import Path

import numpy as np
import pytest

from analysis.inputs.records import load
from analysis.quantities.cells import estimate_cells
from analysis.quantities.targets import targets
from harness.config import RunConfig
from harness.record import read_json
from sweeps.added import ROUNDS_JSONL, Proposal, read_rounds, write_round
from sweeps.cli import main
from sweeps.launch import stage_runs
from sweeps.store import SweepFolder, write_sweep
from sweeps.tuning.axes import read_axes
from sweeps.tuning.cells import by_cell, tuned_cells
from sweeps.tuning.cost import Outcome, outcomes
from sweeps.tuning.proposals import Bench, Limits, propose, standings
from sweeps.tuning.tune import limits_of, tune
from tests.planted_sweeps import LIMITS, planted_runs, planted_spec, tuned
from tests.planted_training import Plant, targets_of
from tests.synthetic import Planted
from tests.test_thread import SWEEP as REAL_SWEEP

TRAIN = "tests.planted_training:train"
CENTRED = {"adamw": (0.01, 0.02, 0.04), "muon": (0.01, 0.02, 0.04)}
#: Four to sixteen times below and above the planted best rates.
TOO_LOW, TOO_HIGH = (0.0006, 0.00125, 0.0025), (0.16, 0.32, 0.64)


def covered(plant: Plant, rates: tuple[float, ...]) -> tuple[int, int, list[int]]:
    """Return how many planted optima lie in their interval, of how many cells, and the trials of the cells."""
    spec = planted_spec({"adamw": rates, "muon": rates}, budget_tokens=2_000_000)
    bench, _ = tuned(plant, planted_runs(spec))
    inside = 0
    for cell, standing in zip(bench.cells, standings(bench, LIMITS), strict=True):
        known, truth = standing.state, plant.optimizers[cell.optimizer].optimum(cell.batch)
        inside += known is not None and known.low is not None and (known.low <= truth <= (known.high or 0.0))
    return inside, len(bench.cells), [len(own) for own in bench.runs]


def test_tune_finds_planted_optima_and_spends_as_many_trials_on_each_optimizer() -> None:
    inside = cells = 0
    for draw in range(8):
        found, of, trials = covered(Plant(noise=0.1, draw=draw), CENTRED["adamw"])
        inside, cells = inside + found, cells + of
        assert trials[:3] == trials[3:]  # adamw, then muon, at the same batches
    assert inside >= 0.8 * cells


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "exponent"), [(0.05, 0.5), (0.1, 0.5), (0.2, 0.2)])
def test_tune_covers_the_planted_optimum_in_a_hundred_laboratories(noise: float, exponent: float) -> None:
    optimizers = {
        "adamw": Planted(180_000.0, 2_000.0, lr_exponent=exponent),
        "muon": Planted(120_000.0, 3_000.0, lr_exponent=exponent),
    }
    counts = [covered(Plant(optimizers, noise=noise, draw=draw), CENTRED["adamw"])[:2] for draw in range(100)]
    inside, cells = np.sum(counts, axis=0)
    assert 0.85 <= inside / cells <= 0.96


@pytest.mark.parametrize("rates", [TOO_LOW, TOO_HIGH])
def test_tune_extends_the_grid_to_an_optimum_outside(rates: tuple[float, ...]) -> None:
    plant = Plant(noise=0.03)
    spec = planted_spec({"muon": rates}, budget_tokens=2_000_000)
    bench, reasons = tuned(plant, planted_runs(spec))
    assert any(why.startswith("edge") for why in reasons[0])
    for cell, standing in zip(bench.cells, standings(bench, LIMITS), strict=True):
        assert standing.state is not None
        assert standing.state.is_settled
        assert standing.state.optimum == pytest.approx(plant.optimizers["muon"].optimum(cell.batch), rel=0.2)


def test_tune_does_not_go_beyond_rates_that_diverge() -> None:
    plant = Plant({"muon": Planted(120_000.0, 3_000.0, lr_exponent=0.0)}, noise=0.03, wall=1.5)
    bench, _ = tuned(plant, planted_runs(planted_spec({"muon": (0.01, 0.02, 0.04)})))
    tried = {run.optimizer.peak_lr for own in bench.runs for run in own}
    assert max(tried) == 0.04
    assert {each.verdict for each in outcomes(bench, LIMITS)} == {"ok"}


def test_tune_adds_seeds_where_rates_are_closer_than_the_noise() -> None:
    noisy = Plant({"muon": Planted(120_000.0, 3_000.0, lr_exponent=0.0)}, noise=0.3)
    bench, reasons = tuned(noisy, planted_runs(planted_spec({"muon": (0.01, 0.02, 0.04)}, budget_tokens=2_000_000)))
    assert any(why.startswith("seeds: the rates differ by less than the noise") for each in reasons for why in each)
    assert {run.init_seed for own in bench.runs for run in own} > {0, 1, 2}


def test_proposals_do_not_depend_on_the_order_of_the_runs() -> None:
    runs = planted_runs(planted_spec(CENTRED))
    plant, cells = Plant(noise=0.1), tuned_cells(runs)

    def proposed(listed: list[RunConfig]) -> list[tuple[str, str]]:
        bench = Bench(cells, by_cell(cells, listed), targets_of(plant, listed))
        return [(each.run.run_id, each.why) for each in propose(bench, LIMITS)]

    assert proposed(runs)
    assert proposed(runs) == proposed(runs[::-1])


def test_trials_are_equal_also_where_the_grid_is_not() -> None:
    spec = planted_spec({"adamw": (0.005, 0.01, 0.02, 0.04, 0.08), "muon": (0.02,)})
    bench, _ = tuned(Plant(), planted_runs(spec))
    trials = [len(own) for own in bench.runs]
    assert trials[:3] == trials[3:]


def test_limits_are_kept() -> None:
    runs = planted_runs(planted_spec({"adamw": TOO_LOW, "muon": CENTRED["muon"]}))
    bench, _ = tuned(Plant(noise=0.1), runs, Limits(trials=8))
    assert {len(own) for own in bench.runs} == {8}
    found = outcomes(bench, Limits(trials=8))
    assert "trials" in {each.verdict for each in found}
    budget = 30_000_000
    bench, _ = tuned(Plant(noise=0.1), runs, Limits(trials=40, budget_tokens=budget))
    assert sum(each.tokens for each in outcomes(bench, Limits(40))) <= budget
    trials = [len(own) for own in bench.runs]
    assert trials[:3] == trials[3:]


def test_new_rates_stop_where_they_cannot_win_but_never_within_a_decaying_schedule() -> None:
    plant = Plant({"muon": Planted(120_000.0, 3_000.0)}, noise=0.03)
    rates = {"muon": (0.04, 0.08, 0.16)}  # four to eight times too high: T is far above that of the best
    warmup = {"warmup_tokens": 1024}
    constant = planted_runs(planted_spec(rates, budget_tokens=2_000_000))
    cosine = planted_runs(planted_spec(rates, budget_tokens=2_000_000, schedule={"kind": "cosine", **warmup}))
    for runs, stops in ((constant, True), (cosine, False)):
        bench, _ = tuned(plant, runs)
        own = {run.run_id for run in runs}
        added = [run for each in bench.runs for run in each if run.run_id not in own]
        plain = {run.global_batch_tokens: run.token_budget for run in runs}
        assert added
        assert any(run.token_budget < plain[run.global_batch_tokens] for run in added) == stops
        for cell, each, standing in zip(bench.cells, bench.runs, standings(bench, LIMITS), strict=True):
            assert standing.state is not None
            assert standing.state.log_tokens is not None
            assert all(run.token_budget > np.exp(standing.state.log_tokens) for run in each), cell


def test_axis_is_tuned_at_the_best_rate_and_the_rate_again() -> None:
    plant = Plant(noise=0.02, best_decay=0.2, decay_curvature=0.2)
    axes = {"optimizer.weight_decay": [0.05, 0.2, 0.8]}
    bench, reasons = tuned(plant, planted_runs(planted_spec(CENTRED)), axes=axes)
    why = [each.partition(":")[0] for own in reasons for each in own]
    assert {"axis", "start"} <= set(why)
    for each in outcomes(bench, LIMITS):
        assert each.setting == "weight_decay=0.2"
        assert each.verdict == "ok"
        truth = plant.optimizers[each.optimizer].optimum(each.global_batch_tokens)
        assert each.optimum == pytest.approx(truth, rel=0.15)
        assert each.full_grid_tokens > each.tokens


def test_axis_of_one_optimizer_gives_the_other_as_many_trials() -> None:
    runs = planted_runs(planted_spec(CENTRED))
    bench, _ = tuned(Plant(noise=0.02), runs, axes=read_axes(["optimizer.momentum=0.8,0.9"], runs))
    by_optimizer = {name: [own for c, own in zip(bench.cells, bench.runs, strict=True) if c.optimizer == name]
                    for name in CENTRED}  # fmt: skip
    assert [len(own) for own in by_optimizer["adamw"]] == [len(own) for own in by_optimizer["muon"]]
    assert {run.optimizer.momentum for own in by_optimizer["muon"] for run in own} == {0.8, 0.9, 0.95}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("optimizer.weight_decy=1", "'optimizer.weight_decy' to tune; did you mean 'optimizer.weight_decay'?"),
        ("optimizer.weight_decay", "expected key=value,value, as in --axis optimizer.weight_decay=0.05,0.1,0.2"),
        ("optimizer.weight_decay=", "expected key=value,value"),
        ("optimizer.peak_lr=0.1", "no run has 'optimizer.peak_lr' to tune"),
        ("token_budget=1024", "no run has 'token_budget' to tune"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: expected a number of at least 0, not -1"),
        ("optimizer.weight_decay=[", "is no list of values"),
    ],
)  # fmt: skip
def test_axis_that_cannot_be_tuned_is_refused(axis: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"optimizer|token_budget") as error:
        read_axes([axis], planted_runs(planted_spec(CENTRED)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_limits_that_do_not_allow_the_grid_are_refused(tmp_path: Path) -> None:
    spec, folder = planted_spec(CENTRED), SweepFolder(tmp_path)
    runs = planted_runs(spec)
    with pytest.raises(ValueError, match="--trials 5: the grid of small already has 6 runs"):
        limits_of(spec, runs, folder, 5, None)
    with pytest.raises(ValueError, match=r"--budget-tokens 1,000: the grid of small takes up to [\d,]+ tokens beside"):
        limits_of(spec, runs, folder, None, 1000)
    with pytest.raises(SystemExit):
        main(["tune", "quickstart", "--budget-tokens", "0"])


def started(path: Path) -> tuple[SweepFolder, list[RunConfig], Limits]:
    spec, folder = planted_spec(CENTRED, batches=(256, 1024)), SweepFolder(path)
    runs = planted_runs(spec)
    write_sweep(spec, runs, folder)
    return folder, runs, limits_of(spec, runs, folder, None, None)


def tune_here(path: Path) -> list[Outcome]:
    folder, runs, limits = started(path)
    return tune(folder, runs, {}, limits, slots=1, train=TRAIN)


def test_killed_tune_goes_on_to_the_same_runs(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = tune_here(whole)
    started(killed)
    for left in (3, 14, 5):  # in the grid, in a round, in a round
        (killed / "die_after.txt").write_text(str(left))
        with pytest.raises(ValueError, match=r"have no result, the first is .*start again: what is finished is kept"):
            tune_here(killed)
    (killed / "die_after.txt").unlink()
    assert tune_here(killed) == found
    manifests = [SweepFolder(path).read_manifest().runs for path in (whole, killed)]
    assert manifests[0] == manifests[1]
    assert read_rounds(whole) == read_rounds(killed)


def test_tune_uses_what_the_sweep_has_finished_and_the_sweep_keeps_what_tune_adds(tmp_path: Path) -> None:
    tune_here(tmp_path)
    folder, runs, _ = started(tmp_path)  # as `critbatch run` does
    added = [run_id for each in read_rounds(tmp_path) for run_id in each.reasons]
    listed = [run.run_id for run in folder.read_manifest().runs]
    assert added
    assert listed == [*(run.run_id for run in runs), *added]
    at = {run_id: read_json(folder.run(run_id).run) for run_id in listed}
    tune_here(tmp_path)
    assert {run_id: read_json(folder.run(run_id).run) for run_id in listed} == at
    other = planted_spec(CENTRED, batches=(256, 1024), schedule={"warmup_tokens": 2048})
    write_sweep(other, planted_runs(other), folder)  # the added runs are not of this sweep
    assert not set(added) & {run.run_id for run in folder.read_manifest().runs}


def test_analysis_chooses_among_what_was_tuned_beside_the_rate(tmp_path: Path) -> None:
    folder, runs, limits = started(tmp_path)
    axes = read_axes(["optimizer.weight_decay=0.05,0.2"], runs)
    found = tune(folder, runs, axes, limits, slots=1, train=TRAIN)
    assert folder.read_manifest().tuned == ("optimizer.weight_decay",)
    records = load(tmp_path)
    assert set(records.runs["optimizer"]) == {"adamw", "muon"}
    cells = estimate_cells(targets(records), 0.9).cells
    assert set(cells["tuning"]) <= {f"weight_decay={decay:g}" for decay in (0.05, 0.1, 0.2)}
    assert len(cells) == len(cells.unique(("optimizer", "global_batch_tokens", "target_loss_nats"))) == 4
    assert {(each.optimizer, each.global_batch_tokens) for each in found} == {
        tuple(row) for row in cells.select("optimizer", "global_batch_tokens").rows()
    }


def test_half_a_round_is_proposed_again(tmp_path: Path) -> None:
    run = planted_runs(planted_spec(CENTRED))[0]
    write_round(tmp_path, "tune", [], [Proposal(run, "edge")])
    whole = read_rounds(tmp_path)
    file = tmp_path / ROUNDS_JSONL
    file.write_text(file.read_text() + '{"command": "tu')
    assert read_rounds(tmp_path) == whole
    write_round(tmp_path, "tune", [], [Proposal(run, "edge")])
    assert read_rounds(tmp_path) == whole * 2
    file.write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1: not a round"):
        read_rounds(tmp_path)


def test_runs_of_a_round_have_a_reason_each(tmp_path: Path) -> None:
    tune_here(tmp_path)
    rounds = [json.loads(line) for line in (tmp_path / ROUNDS_JSONL).read_text().splitlines()]
    folder = SweepFolder(tmp_path)
    added = {run_id for each in rounds for run_id in each["reasons"]}
    assert added < {run.run_id for run in stage_runs(folder, "grid")}
    assert {why.partition(":")[0] for each in rounds for why in each["reasons"].values()} <= {
        "edge", "between", "seeds", "equal"
    }  # fmt: skip


@pytest.mark.slow
def test_tune_trains_for_real(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "thread.yaml").write_text(REAL_SWEEP.format(text=text))
    small = ["--set", "targets_nats=[2.5]", "--set", "base.stop_at_loss_nats=2.45", "--set", "global_batch_tokens=256"]
    small += ["--set", "confirm=null", "--set", "optimizers.adamw.learning_rate=[0.01,0.02]"]
    arguments = ["tune", str(tmp_path / "thread.yaml"), "--results", str(tmp_path), "--trials", "6", *small]
    assert main([*arguments, "--dry-run"]) == 0
    assert "First the 4 runs that the sweep lacks" in capsys.readouterr().out
    status = main([*arguments, "--slots", "1"])
    out = capsys.readouterr().out
    assert status in (0, 1)
    assert "adamw: 6 trials" in out or "adamw: " in out
    trials = [line.split(": ")[1].split(" trials")[0] for line in out.splitlines() if " trials, " in line]
    assert len(trials) == 2
    assert trials[0] == trials[1]
    assert main([*arguments, "--dry-run"]) == 0
    assert "Nothing to do." in capsys.readouterr().out

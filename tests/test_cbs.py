"""`critbatch cbs` on laboratories with a planted critical batch, under its own stopping rule."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.quantities.knee_search import knee_so_far
from harness.config import RunConfig
from sweeps.added import read_rounds
from sweeps.cli import main
from sweeps.store import SweepFolder, records
from sweeps.tuning.cbs import REPORTED_LEVEL, STOP_LEVEL, KneeOutcome, cbs, series_cells, write_finished
from sweeps.tuning.cells import by_cell, relabelled, tuned_cells
from sweeps.tuning.knee import Goal, KneeBench, propose_for_knee
from tests.planted_sweeps import planted_runs, planted_spec
from tests.planted_training import Plant, spent_tokens, targets_of
from tests.sweep_examples import write_yaml
from tests.synthetic import Planted
from tests.test_thread import SWEEP as REAL_SWEEP

TRAIN = "tests.planted_training:train"
BATCHES = (256, 512, 1024, 2048, 4096, 8192, 16384)
B_CRIT = 3_000.0
RULE = {"centre": 0.02, "at_batch_tokens": 1024, "multiples": [0.5, 1, 2]}


def grid(seeds: int, batches: Sequence[int] = BATCHES) -> list[RunConfig]:
    """Return the full grid: three rates around the planted optimum of each batch."""
    spec = planted_spec({"muon": (0.02,)}, batches, range(seeds), budget_tokens=400_000)
    rule = spec.optimizers["muon"].learning_rate
    assert rule is not None
    moved = type(rule).model_validate(RULE)
    optimizers = {"muon": spec.optimizers["muon"].model_copy(update={"learning_rate": moved})}
    return planted_runs(spec.model_copy(update={"optimizers": optimizers}))


def plant(noise: float, draw: int, alpha: float = 1.0) -> Plant:
    return Plant({"muon": Planted(120_000.0, B_CRIT, alpha=alpha)}, noise=noise, draw=draw)


def measured(laboratory: Plant, ratio: float, slots: int = 1) -> tuple[KneeBench, list[RunConfig]]:
    """Measure until nothing is proposed; return the last bench and the runs."""
    cells, listed, goal = tuned_cells(grid(2)), list[RunConfig](), Goal(ratio, STOP_LEVEL, slots)
    cells = sorted(cells, key=lambda cell: cell.batch)
    while True:
        bench = KneeBench(cells, by_cell(cells, listed), targets_of(laboratory, listed), goal)
        more = propose_for_knee(bench)
        if not more:
            return bench, listed
        assert not {each.run.run_id for each in more} & {run.run_id for run in listed}
        listed += [each.run for each in more]
        assert len(listed) < 200


def reported(bench: KneeBench) -> tuple[float, float]:
    knee = replace(bench, goal=replace(bench.goal, level=REPORTED_LEVEL)).knee
    assert knee is not None
    assert knee.estimate.low is not None
    assert knee.estimate.high is not None
    return knee.estimate.low, knee.estimate.high


def full_grid(laboratory: Plant, ratio: float) -> int:
    """Return the tokens of the smallest full grid whose interval is as narrow."""
    for seeds in range(2, 9):
        runs = grid(seeds)
        cells = tuned_cells(runs)
        knee = knee_so_far(relabelled(targets_of(laboratory, runs), cells, by_cell(cells, runs)), REPORTED_LEVEL)
        if knee is not None and knee.ratio is not None and knee.ratio <= ratio:
            return spent_tokens(laboratory, runs)
    return spent_tokens(laboratory, runs)


def test_cbs_stops_at_the_width_asked_for_with_a_fraction_of_the_full_grid() -> None:
    tokens = full = 0
    for draw in range(3):
        laboratory = plant(0.05, draw)
        bench, runs = measured(laboratory, 1.4)
        low, high = reported(bench)
        assert bench.is_narrow
        assert high / low <= 1.4
        assert bench.knee is not None
        assert len(bench.knee.runs) >= 5
        assert min(bench.knee.runs) <= low < high <= max(bench.knee.runs)
        tokens, full = tokens + spent_tokens(laboratory, runs), full + full_grid(laboratory, high / low)
    assert tokens < 0.6 * full


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "ratio", "alpha"), [(0.05, 1.3, 1.0), (0.1, 1.6, 1.0), (0.1, 1.6, 1.2)])
def test_cbs_covers_the_planted_knee_in_a_hundred_laboratories(noise: float, ratio: float, alpha: float) -> None:
    inside, tokens, full = 0, [], []
    for draw in range(100):
        laboratory = plant(noise, draw, alpha)
        bench, runs = measured(laboratory, ratio)
        low, high = reported(bench)
        inside += low <= B_CRIT <= high
        tokens.append(spent_tokens(laboratory, runs))
        if draw < 20:
            full.append(full_grid(laboratory, high / low))
    print(f"noise {noise}, α {alpha}: covers {inside} %, {np.mean(tokens[:20]) / np.mean(full):.0%} of the full grid")
    assert 85 <= inside <= 97
    assert np.mean(tokens[:20]) < 0.5 * np.mean(full)


def test_proposals_are_the_same_each_time_and_as_many_as_there_are_slots() -> None:
    laboratory = plant(0.1, 0)
    bench, runs = measured(laboratory, 2.5)
    cells, goal = bench.cells, Goal(1.2, STOP_LEVEL, slots=4)
    benches = [KneeBench(cells, by_cell(cells, own), targets_of(laboratory, own), goal) for own in (runs, runs[::-1])]
    first, second = ([each.run.run_id for each in propose_for_knee(bench)] for bench in benches)
    assert first == second
    assert len(first) == 4


def test_cbs_uses_the_finished_runs_of_the_plain_sweep() -> None:
    laboratory, runs = plant(0.05, 0), grid(4)
    cells = sorted(tuned_cells(runs), key=lambda cell: cell.batch)
    bench = KneeBench(cells, by_cell(cells, runs), targets_of(laboratory, runs), Goal(2.0, STOP_LEVEL))
    assert bench.is_narrow
    assert propose_for_knee(bench) == []


def test_cbs_goes_to_larger_batches_until_they_bracket_the_knee() -> None:
    laboratory = Plant({"muon": Planted(120_000.0, 9_000.0)}, noise=0.02)
    bench, _ = measured(laboratory, 2.0)
    assert bench.knee is not None
    assert max(bench.knee.runs) == 16384
    low, high = reported(bench)
    assert low <= 9_000 <= high


def started(path: Path) -> tuple[SweepFolder, list[RunConfig]]:
    spec, folder = planted_spec({"muon": (0.02, 0.04)}, BATCHES, budget_tokens=400_000), SweepFolder(path)
    runs = planted_runs(spec)
    write_finished(spec, runs, folder)
    return folder, runs


def measure_here(path: Path) -> KneeOutcome:
    folder, runs = started(path)
    return cbs(folder, series_cells(runs, []), Goal(2.5, STOP_LEVEL, slots=2), None, 1, train=TRAIN)[0]


def test_killed_cbs_goes_on_to_the_same_runs(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = measure_here(whole)
    assert found.verdict == "ok"
    assert found.runs == len(SweepFolder(whole).read_manifest().runs)
    started(killed)
    for left in (4, 9):
        (killed / "die_after.txt").write_text(str(left))
        with pytest.raises(ValueError, match="have no result"):
            measure_here(killed)
    (killed / "die_after.txt").unlink()
    assert measure_here(killed) == found
    assert read_rounds(whole) == read_rounds(killed)


def test_outcome_says_what_it_took_and_what_the_full_grid_would() -> None:
    found = KneeOutcome(
        "115k", "muon", 3000.0, 2400.0, 3600.0, "ok", 20, 5_000_000, 20_000_000, "7 batches, 3 rates, 3 seeds"
    )
    assert found.in_words == (
        "115k, muon: critical batch 3,000 tokens, 90 % interval 2,400 to 3,600, ratio 1.5 (ok); 20 runs, 5,000,000 "
        "tokens, 25% of the 20,000,000 of the full grid (7 batches, 3 rates, 3 seeds)"
    )
    lost = replace(found, value=None, verdict="not_reached")
    assert lost.in_words == "115k, muon: no critical batch size (not_reached); 20 runs, 5,000,000 tokens"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "1"], "--width 1: it is the interval's upper end over its lower one, above 1"),
        (["--width", "1.5", "--optimizer", "mun"], "--optimizer mun: the sweep does not run it; did you mean 'muon'?"),
        (["--width", "1.5"], "the sweep has 3 batches of muon (256, 1,024, 4,096); a critical batch takes 4 to choose"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = planted_spec({"muon": (0.02,)}, (256, 1024, 4096))
    runs = planted_runs(spec)
    monkeypatch.setattr("sweeps.plan.prepare_runs", lambda _: (runs, lambda _: None))
    file = write_yaml(tmp_path, spec.model_dump(mode="json", exclude_defaults=True))
    assert main(["cbs", file, "--results", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_cbs_trains_for_real(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "thread.yaml").write_text(REAL_SWEEP.format(text=text))
    small = ["--set", "targets_nats=[2.5]", "--set", "base.stop_at_loss_nats=2.45", "--set", "confirm=null"]
    small += ["--set", "grid.global_batch_tokens=[64, 128, 256, 512, 1024]"]
    arguments = ["cbs", str(tmp_path / "thread.yaml"), "--results", str(tmp_path), "--optimizer", "muon", *small]
    status = main([*arguments, "--width", "10", "--budget-tokens", "1500000", "--slots", "1"])
    out = capsys.readouterr().out
    assert status in (0, 1)
    assert "d32l1, muon: " in out
    assert (status == 0) == ("(ok)" in out)
    assert sum(run["tokens_seen"] for run in records(SweepFolder(tmp_path / "thread"))) <= 1_500_000


def test_budget_that_does_not_allow_the_start_is_refused(tmp_path: Path) -> None:
    folder, runs = started(tmp_path)
    with pytest.raises(ValueError, match=r"--budget-tokens 1,000: to start with it takes up to [\d,]+, 0 of which"):
        cbs(folder, series_cells(runs, []), Goal(1.5, STOP_LEVEL), 1000, 1, train=TRAIN)

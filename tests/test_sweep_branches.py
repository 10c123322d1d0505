"""Branches of a sweep: their configurations, what they wait for, and that a pool trains them beside their trunks."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from analysis.inputs.records import load
from harness.record import read_json
from harness.schedule import learning_rate_factor
from sweeps.branches import waits_for
from sweeps.grid import expand
from sweeps.launch import run_folder
from sweeps.plan import make_plan
from sweeps.plan_view import as_json, as_table
from sweeps.pool import Pool
from sweeps.spec import SweepSpec
from sweeps.speed import Speed, measured_speeds
from sweeps.status import read_status
from sweeps.store import SweepFolder, read_run, write_sweep
from sweeps.tuning.tune import check_protocols
from sweeps.upkeep import leftovers
from sweeps.widths.families import families
from tests.sweep_examples import changed, prepared

TRAIN = "tests.fake_training:train"
DECAY = {"token_budgets": [4096, 8192, 16384]}
BATCH = {"at_tokens": [4096, 8192], "multiples": [1, 2, 4], "tokens": 4096}


def sweep(**keys: Any) -> SweepSpec:
    """Return one trunk and its branches."""
    content = changed(optimizers={"adamw": {"learning_rate": [0.01]}}, grid={"global_batch_tokens": [256]})
    del content["token_budget"]
    return SweepSpec.parse(content | {"machine": {"accelerator": "cpu"}} | keys, source="branched")


def started(path: Path, **keys: Any) -> SweepFolder:
    folder, spec = SweepFolder(path), sweep(**keys)
    write_sweep(spec, expand(spec, prepared), folder)
    return folder


def states(folder: SweepFolder) -> list[tuple[str, str]]:
    """Return the state of the trunk and of each branch, with what is said of it."""
    return [(str(run.state), run.reason or "") for run in read_status(folder).runs]


def behave(folder: SweepFolder, action: str) -> None:
    (folder.path / "behaviour.txt").write_text(action)


def attempts(folder: SweepFolder) -> list[int]:
    files = [folder.run(run.run_id).path / "attempts.txt" for run in folder.read_manifest().runs]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def test_decay_branch_is_a_wsd_run_that_leaves_its_trunk_at_its_last_stable_step() -> None:
    trunk, *branches = expand(sweep(branched_decay=DECAY), prepared)
    for branch, budget in zip(branches, DECAY["token_budgets"], strict=True):
        assert branch.branch is not None
        assert (branch.branch.parent, branch.token_budget, branch.protocol) == (trunk.run_id, budget, "branched_decay")
        last = branch.first_step
        assert [learning_rate_factor(step, branch) == 1.0 for step in (last, last + 1)] == [True, False]
        alone = branch.model_copy(update={"branch": None, "schedule": trunk.schedule})
        assert alone.model_copy(update={"token_budget": trunk.token_budget}).run_id == trunk.run_id
    points = tuple(branch.branch.at_tokens for branch in branches if branch.branch)
    assert trunk.keep_at_tokens == points
    assert trunk.realized_tokens == points[-1] < DECAY["token_budgets"][-1]


def test_trunk_is_the_same_run_whatever_it_keeps() -> None:
    trunk, *_ = expand(sweep(branched_batch=BATCH, token_budget=16384), prepared)
    (alone,) = expand(sweep(token_budget=16384), prepared)
    assert trunk.keep_at_tokens == (4096, 8192)
    assert trunk.run_id == alone.run_id


def test_batch_branches_have_multiples_of_batch_and_root_multiples_of_rate_from_the_branch_on() -> None:
    trunk, *branches = expand(sweep(branched_batch=BATCH), prepared)
    found = [(run.branch.at_tokens, run.global_batch_tokens, run.optimizer.peak_lr) for run in branches if run.branch]
    assert found == [(at, 256 * k, pytest.approx(0.01 * k**0.5)) for at in (4096, 8192) for k in (1, 2, 4)]
    for run in branches:
        assert run.branch
        assert run.realized_tokens == run.branch.at_tokens + 4096
        assert run.clock.batch_at(run.first_step) == 256
        before, after = (learning_rate_factor(run.first_step + more, run) * run.optimizer.peak_lr for more in (0, 1))
        assert (before, after) == (pytest.approx(0.01), run.optimizer.peak_lr)
    assert trunk.realized_tokens == 8192


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"branched_decay": DECAY, "token_budget": 8192}, "ends at 8192; raise token_budget, or leave it out"),
        (
            {"branched_batch": BATCH | {"at_tokens": [4000]}},
            "4000 is not a whole number of steps of 256 tokens; .* 3840",
        ),
        ({"branched_batch": BATCH | {"tokens": 4352}}, "4352 is not a whole number of steps of 512 tokens"),
        ({"branched_batch": BATCH | {"multiples": [2, 4]}}, r"multiples \[2, 4\] lack 1"),
        ({"branched_decay": {"token_budgets": [4096, 4096]}}, "token_budgets lists 4096 twice"),
        ({"branched_decay": DECAY, "confirm": {"seeds": [5]}}, "remove confirm"),
    ],
)
def test_branches_that_cannot_be_are_refused_with_the_numbers(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        expand(sweep(**keys), prepared)


@pytest.mark.parametrize(
    ("base", "words"),
    [({"schedule": {"kind": "cosine"}}, "kind is 'cosine'"), ({"stop_at_loss_nats": 2.5}, "stop_at_loss_nats 2.5")],
)
def test_trunks_that_may_not_reach_a_branch_are_refused(base: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        expand(sweep(branched_decay=DECAY, base=changed()["base"] | base), prepared)


def test_tuning_refuses_branches() -> None:
    with pytest.raises(ValueError, match="branched_decay, whose curves say nothing"):
        check_protocols(expand(sweep(branched_decay=DECAY), prepared))


def test_telescoping_refuses_branches() -> None:
    with pytest.raises(ValueError, match="is a branch, and telescoping compares whole runs"):
        families(expand(sweep(branched_decay=DECAY), prepared))


def test_speed_is_measured_on_what_a_branch_has_done_itself() -> None:
    row = {"device": "cpu", "status": "finished", "train_seconds": 2.0, "flops_per_token": 10.0}
    row |= {"tokens_seen": 400, "step": 4, "optimizer_flops_per_step": 100.0}
    whole, branch = (measured_speeds([row | {"branch_tokens": at}])[0].flops_per_second for at in (None, 300))
    assert (whole, branch) == ((4000 + 400) / 2, (1000 + 100) / 2)


def test_pool_trains_a_branch_while_its_trunk_still_trains(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", branched_batch=BATCH)
    behave(folder, "wait-for-a-branch")
    run_folder(folder, slots=2, train=TRAIN)
    assert states(folder) == [("finished", "budget")] * 7
    assert attempts(folder) == [1] * 7


def test_one_slot_is_never_held_by_a_branch_that_waits(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", branched_decay=DECAY)
    behave(folder, "slow")
    run_folder(folder, slots=1, train=TRAIN)
    assert [state for state, _ in states(folder)] == ["finished"] * 4


def test_branch_waits_for_the_state_of_its_trunk(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", branched_decay=DECAY)
    trunk, branch, *_ = (read_run(folder.run(run.run_id)) for run in folder.read_manifest().runs)
    assert branch.branch
    waits = f"waits for its trunk {trunk.run_id} to come to {branch.branch.at_tokens:,} tokens"
    assert waits_for(trunk, folder) is None
    assert waits_for(branch, folder) == waits
    assert states(folder)[:2] == [("planned", ""), ("waiting", waits)]
    folder.run(trunk.run_id).kept(branch.branch.at_tokens).touch()
    assert waits_for(branch, folder) is None
    assert states(folder)[1] == ("planned", "")


def test_branch_that_has_begun_needs_its_trunk_no_more(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", branched_decay=DECAY)
    branch = folder.read_manifest().runs[1]
    folder.run(branch.run_id).checkpoint.touch()
    assert waits_for(read_run(folder.run(branch.run_id)), folder) is None


def test_pool_that_is_given_branches_alone_trains_their_trunk(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", branched_decay=DECAY)
    runs = [folder.run(run.run_id) for run in folder.read_manifest().runs]
    with Pool([{}], TRAIN) as pool:
        pool.train(runs[1:], lambda: None)
    assert attempts(folder) == [1] * 4


def test_branches_of_a_trunk_that_failed_are_blocked_and_go_on_once_it_is_retried(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", branched_decay=DECAY, optimizers={"muon": {"learning_rate": [0.02]}})
    behave(folder, "raise")
    run_folder(folder, slots=2, train=TRAIN)
    trunk, *others = states(folder)
    assert trunk[0] == "failed"
    assert {state for state, _ in others} == {"blocked"}
    assert others[0][1].endswith("failed: the corpus has been moved")
    behave(folder, "finish")
    run_folder(folder, slots=2, train=TRAIN)
    assert [state for state, _ in states(folder)] == ["finished"] * 4


def test_branches_diverge_with_a_trunk_that_did_before_they_start(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", branched_decay=DECAY)
    behave(folder, "diverge-after-the-first-branch")
    run_folder(folder, slots=2, train=TRAIN)
    trunk, *branches = (folder.run(run.run_id) for run in folder.read_manifest().runs)
    found = [(state, reason) for state, reason in states(folder)]
    assert found == [
        ("diverged", "non_finite_loss"), ("finished", "budget"), *[("diverged", "trunk_diverged")] * 2,
    ]  # fmt: skip
    assert attempts(folder) == [1, 1, 0, 0]
    records = load(folder.path).runs.filter(status="diverged", protocol="branched_decay")
    assert set(records["parent_run_id"]) == {trunk.path.name}
    assert [read_run(run).run_id for run in branches[1:]] == [read_json(run.run)["run_id"] for run in branches[1:]]


def test_branches_of_a_trunk_that_finished_without_keeping_are_blocked_with_what_to_do(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", branched_decay=DECAY)
    behave(folder, "keep-nothing")
    run_folder(folder, slots=2, train=TRAIN)
    trunk, *branches = states(folder)
    assert trunk[0] == "finished"
    assert {state for state, _ in branches} == {"blocked"}
    assert "without keeping its state at 3,584 tokens, or that was removed; move" in branches[0][1]
    run = folder.run(folder.read_manifest().runs[0].run_id)
    run.path.rename(folder.path / "away")
    behave(folder, "finish")
    write_sweep(folder.read_spec(), expand(folder.read_spec(), prepared), folder)
    run_folder(folder, slots=2, train=TRAIN)
    assert [state for state, _ in states(folder)] == ["finished"] * 4


def test_clean_removes_a_kept_state_once_every_branch_that_starts_there_has_its_result(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", branched_batch=BATCH)
    behave(folder, "finish")
    run_folder(folder, slots=2, train=TRAIN)
    trunk = folder.run(folder.read_manifest().runs[0].run_id)
    assert [path.name for path in leftovers(folder) if path.suffix == ".ckpt"] == ["kept-4096.ckpt", "kept-8192.ckpt"]
    last = next(run.run_id for run in folder.read_manifest().runs if at_tokens(folder, run.run_id) == 8192)
    folder.run(last).run.unlink()
    assert trunk.kept(4096) in leftovers(folder)
    assert trunk.kept(8192) not in leftovers(folder)


def at_tokens(folder: SweepFolder, run_id: str) -> int | None:
    run = read_run(folder.run(run_id))
    return run.branch.at_tokens if run.branch else None


def test_plan_shows_trunk_and_branches_and_what_branching_saves() -> None:
    spec = sweep(branched_decay=DECAY)
    runs = expand(spec, prepared)
    plan = make_plan(spec, runs, lambda _: None, 2, Speed(1e9, "as stated"))
    content = as_json(plan)
    trained = [cell["trained_tokens"] for cell in content["cells"]]
    assert trained == [runs[0].realized_tokens, *(b.realized_tokens - b.branch.at_tokens for b in runs[1:] if b.branch)]
    assert content["tokens"] == sum(trained)
    assert content["tokens_without_branching"] == 4096 + 8192 + 16384
    text = printed(as_table(plan))
    assert f"3 branches from 1 trunk: {sum(trained):,} tokens in all, 63% of the 28,672" in text
    assert "Disk: 3 states that branches start from" in text


def test_plan_of_branches_puts_seeds_of_a_trunk_into_one_row() -> None:
    spec = sweep(branched_decay=DECAY, grid={"global_batch_tokens": [256], "seed": [0, 1]})
    plan = make_plan(spec, expand(spec, prepared), lambda _: None, 2, Speed(1e9, "as stated"))
    assert [row.runs for row in plan.rows] == [2] * 4


def printed(table: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()

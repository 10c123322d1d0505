"""Branches: runs that start from the kept state of another run, and are the run that was trained from token 0."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from harness.branches import ParentNotReadyError, difference_before
from harness.callbacks.interruption import Interrupted
from harness.config import RunConfig
from harness.flops import train_flops
from harness.record import RunFolder, read_json, read_rows, write_json
from harness.train import train
from tests.runs import tiny_run
from tests.test_config import parse
from tests.test_exact_resume import Observed, flip_one_bit
from tests.test_train import EVERY_STEP, MACHINE, act_in_micro_batch, science_rows, start, write_run

#: Step 17 of 512 tokens is no mark of the evaluation; step 12 is.
TRUNK = {"keep_at_tokens": [6144, 8704], "token_budget": 12_288}
WSD = {"kind": "wsd", "warmup_tokens": 2048}


class Laboratory:
    """One trunk, trained once, and what branches of it are compared with."""

    def __init__(self, text: Path, cache: Path, folder: Path) -> None:
        self.text, self.cache, self.folder = text, cache, folder
        self.trunk = self.run(**TRUNK)
        assert self.train(self.trunk) == "finished"

    def run(self, **changes: Any) -> RunConfig:
        return tiny_run(self.text, self.cache, **changes)

    def branch(self, kind: str, at_tokens: int, **changes: Any) -> RunConfig:
        branch = {"parent": self.trunk.run_id, "at_tokens": at_tokens, "kind": kind}
        return self.run(branch=branch, **changes)

    def train(self, run: RunConfig, machine: Any = MACHINE) -> str:
        return train(run, machine, self.files(run).path, self.cache)

    def files(self, run: RunConfig) -> RunFolder:
        return RunFolder(self.folder / run.run_id)

    def copied(self, folder: Path) -> "Laboratory":
        """Return it with the trunk alone, in another folder."""
        other = object.__new__(Laboratory)
        other.text, other.cache, other.folder, other.trunk = self.text, self.cache, folder, self.trunk
        shutil.copytree(self.files(self.trunk).path, other.files(self.trunk).path)
        return other


@pytest.fixture(scope="module")
def laboratory(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(text, cache, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def fresh(laboratory: Laboratory, tmp_path: Path) -> Laboratory:
    return laboratory.copied(tmp_path)


def batch_changes(at_tokens: int, batch: int, peak_lr: float) -> dict[str, Any]:
    """Return the settings of a run that takes the trunk's batch of 512 until `at_tokens`, and another from there."""
    return {
        "global_batch_tokens": batch,
        "optimizer": {"name": "muon", "peak_lr": peak_lr, "momentum": 0.9},
        "batch_warmup": {"stages": [{"until_tokens": at_tokens, "global_batch_tokens": 512}]},
    }


#: With a quarter or four times the batch and half or twice the rate, √k does not round.
BRANCHES = {
    "decay at a mark": ("decay", 6144, {"schedule": WSD, "token_budget": 7700}),
    "decay between marks": ("decay", 8704, {"schedule": WSD, "token_budget": 10_500}),
    "decay at the end of the trunk": ("decay", 12_288, {"schedule": WSD, "token_budget": 15_000}),
    "larger batch": ("batch", 6144, {"token_budget": 13_000, **batch_changes(6144, 2048, 0.04)}),
    "smaller batch": ("batch", 8704, {"token_budget": 11_000, **batch_changes(8704, 128, 0.01)}),
    "same batch": ("batch", 6144, {"token_budget": 9000, **batch_changes(6144, 512, 0.02)}),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branch_is_the_run_that_is_trained_from_the_start(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Bit for bit: losses, weights, their average, the optimizer's state, the text that is read."""
    kind, at_tokens, changes = BRANCHES[name]
    if at_tokens == laboratory.trunk.realized_tokens:
        laboratory = with_state_at_the_end(laboratory)
    branch, whole = laboratory.branch(kind, at_tokens, **changes), laboratory.run(**changes)
    ends = []
    for run in (branch, whole):
        with monkeypatch.context() as patch:
            observed = Observed(patch)
            assert laboratory.train(run) == "finished"
            ends.append((observed.tensors, dict(observed.read)))
    (tensors, read), (whole_tensors, whole_read) = ends
    assert all(ours.equal(theirs) for ours, theirs in zip(tensors, whole_tensors, strict=True))
    assert read == {index: tokens for index, tokens in whole_read.items() if index >= min(read)}
    assert len(whole_read) - len(read) == at_tokens // 128
    ours, theirs = (science_rows(laboratory.files(run).path) for run in (branch, whole))
    assert without_own(ours[1:]) == without_own([row for row in theirs if row["tokens_seen"] > at_tokens])
    if any(row["tokens_seen"] == at_tokens for row in theirs):
        assert ours[1]["train_loss_nats"] == next(r for r in theirs if r["step"] == ours[1]["step"])["train_loss_nats"]


def with_state_at_the_end(laboratory: Laboratory) -> Laboratory:
    """Return a laboratory whose trunk ends where a branch begins."""
    other = object.__new__(Laboratory)
    other.text, other.cache, other.folder = laboratory.text, laboratory.cache, laboratory.folder / "ends"
    other.trunk = other.run(**(TRUNK | {"keep_at_tokens": [TRUNK["token_budget"]]}))
    assert other.trunk.run_id == laboratory.trunk.run_id
    assert other.train(other.trunk) == "finished"
    return other


def without_own(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without what a branch counts of its own, or from its start."""
    first, *rest = [{k: v for k, v in row.items() if k not in ("run_id", "train_flops")} for row in rows]
    return [{k: v for k, v in first.items() if k != "train_loss_nats"}, *rest]


def test_branch_begins_its_record_where_it_branches_off(laboratory: Laboratory) -> None:
    branch = laboratory.branch("decay", 8704, schedule=WSD, token_budget=10_500)
    laboratory.train(branch)
    rows, record = read_rows(laboratory.files(branch).evaluations), read_json(laboratory.files(branch).run)
    first = rows[0]
    assert (first["step"], first["tokens_seen"]) == (17, 8704)
    assert (first["train_flops"], first["train_loss_nats"]) == (0.0, None)
    assert first["train_seconds"] == pytest.approx(0.0, abs=0.2)
    assert first["learning_rate"] == 0.02
    assert rows[-1]["train_flops"] == train_flops(branch, branch.steps)
    whole = laboratory.run(schedule=WSD, token_budget=10_500)
    assert train_flops(branch, branch.steps) == train_flops(whole, whole.steps) - train_flops(whole, 17)
    assert (record["step"], record["tokens_seen"], record["resumes"]) == (20, 10_240, 0)
    assert (record["parent_run_id"], record["branch_tokens"]) == (laboratory.trunk.run_id, 8704)
    assert (record["protocol"], branch.protocol) == ("branched_decay", "branched_decay")
    trunk = read_json(laboratory.files(laboratory.trunk).run)
    assert (trunk["parent_run_id"], trunk["branch_tokens"], trunk["protocol"]) == (None, None, "constant_ema")
    assert record["train_seconds"] < trunk["train_seconds"]


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 10])
def test_interrupted_branch_is_the_undisturbed_one(
    laboratory: Laboratory, fresh: Laboratory, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    branch = laboratory.branch("batch", 8704, token_budget=11_000, **batch_changes(8704, 128, 0.01))
    laboratory.train(branch)
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, micro_batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            fresh.train(branch)
    fresh.files(fresh.trunk).kept(8704).unlink()  # it is not needed any more
    assert fresh.train(branch) == "finished"
    assert science_rows(fresh.files(branch).path) == science_rows(laboratory.files(branch).path)
    assert read_json(fresh.files(branch).run)["resumes"] == 1


def test_interrupted_trunk_keeps_the_same_states(
    laboratory: Laboratory, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps 12, which keeps its state, 13 and 17."""
    for micro_batch in (48, 2, 16):
        with monkeypatch.context() as patch:
            act_in_micro_batch(patch, micro_batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Interrupted):
                train(laboratory.trunk, MACHINE, tmp_path / laboratory.trunk.run_id, cache)
    assert train(laboratory.trunk, EVERY_STEP, tmp_path / laboratory.trunk.run_id, cache) == "finished"
    ours = sorted(path.name for path in (tmp_path / laboratory.trunk.run_id).glob("*.ckpt*"))
    assert ours == ["kept-6144.ckpt", "kept-8704.ckpt"]
    branch = laboratory.branch("decay", 8704, schedule=WSD, token_budget=10_500)
    laboratory.train(branch)
    train(branch, MACHINE, tmp_path / branch.run_id, cache)
    assert science_rows(tmp_path / branch.run_id) == science_rows(laboratory.files(branch).path)


def test_branch_takes_other_micro_batches_than_its_parent_did(laboratory: Laboratory, fresh: Laboratory) -> None:
    branch = laboratory.branch("decay", 8704, schedule=WSD, token_budget=10_500)
    laboratory.train(branch)
    fresh.train(branch, MACHINE.model_copy(update={"max_micro_batch_tokens": 512}))
    assert read_json(fresh.files(branch).run)["accumulation"] == 1
    of_both = (science_rows(each.files(branch).path) for each in (fresh, laboratory))
    for ours, theirs in zip(*of_both, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["val_loss_nats"] == pytest.approx(theirs["val_loss_nats"], abs=1e-3)


def test_trunk_has_the_numbers_and_the_name_of_one_that_keeps_nothing(laboratory: Laboratory, tmp_path: Path) -> None:
    plain = laboratory.run(token_budget=12_288)
    assert plain.run_id == laboratory.trunk.run_id
    train(plain, MACHINE, tmp_path, laboratory.cache)
    assert science_rows(tmp_path) == science_rows(laboratory.files(laboratory.trunk).path)
    assert not [*tmp_path.glob("*.ckpt")]
    assert "keep_at_tokens" not in read_json(RunFolder(tmp_path).config)


@pytest.mark.slow
def test_branch_on_two_devices_starts_from_a_trunk_on_two(fresh: Laboratory, cache: Path) -> None:
    shutil.rmtree(fresh.files(fresh.trunk).path)
    two = MACHINE.model_copy(update={"devices": 2})
    changes = {"token_budget": 11_000, **batch_changes(8704, 128, 0.01)}
    branch, whole = fresh.branch("batch", 8704, **changes), fresh.run(**changes)
    for run in (fresh.trunk, branch, whole):
        write_run(fresh.files(run).path, run, two)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        output, _ = (process := start(fresh.files(run).path, cache, *launcher)).communicate(timeout=180)
        assert process.returncode == 0, output
    ours, theirs = (science_rows(fresh.files(run).path) for run in (branch, whole))
    assert without_own(ours[1:]) == without_own([row for row in theirs if row["tokens_seen"] > 8704])


def test_branch_without_its_parent_waits(fresh: Laboratory) -> None:
    branch = fresh.branch("decay", 8704, schedule=WSD, token_budget=10_500)
    trunk = fresh.files(fresh.trunk)
    write_json(trunk.run, read_json(trunk.run) | {"status": "running", "tokens_seen": None})
    trunk.kept(8704).rename(trunk.path / "elsewhere")
    with pytest.raises(ParentNotReadyError, match="has not kept its state at 8704 tokens yet"):
        fresh.train(branch)
    assert not fresh.files(branch).path.exists()
    shutil.rmtree(trunk.path)
    with pytest.raises(ParentNotReadyError, match=f"its parent .*{fresh.trunk.run_id} is not there; run it first"):
        fresh.train(branch)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"status": "diverged", "tokens_seen": 4096}, "diverged at 4096 tokens, before 8704"),
        ({"status": "finished", "tokens_seen": 4096}, "stopped at 4096 tokens; list 8704 under its keep_at_tokens and"),
        ({}, "has finished, and .*kept-8704.ckpt is not there; list 8704 under its keep_at_tokens and move its folder"),
    ],
)
def test_branch_of_a_parent_without_the_state_is_refused(
    fresh: Laboratory, record: dict[str, Any], message: str
) -> None:
    trunk = fresh.files(fresh.trunk)
    write_json(trunk.run, read_json(trunk.run) | record)
    trunk.kept(8704).unlink()
    with pytest.raises(ValueError, match=message) as caught:
        fresh.train(fresh.branch("decay", 8704, schedule=WSD, token_budget=10_500))
    assert not isinstance(caught.value, ParentNotReadyError)
    assert "\n" not in str(caught.value)


def test_parent_that_diverged_after_the_branch_has_a_state_to_start_from(fresh: Laboratory) -> None:
    trunk = fresh.files(fresh.trunk)
    write_json(trunk.run, read_json(trunk.run) | {"status": "diverged", "tokens_seen": 12_288})
    assert fresh.train(fresh.branch("decay", 8704, schedule=WSD, token_budget=10_500)) == "finished"


def test_damaged_state_of_a_parent_is_refused_and_left(fresh: Laboratory) -> None:
    kept = fresh.files(fresh.trunk).kept(8704)
    kept.write_bytes(flip_one_bit(kept.read_bytes()))
    with pytest.raises(ValueError, match=r"the state of its parent, .*kept-8704.ckpt, is damaged; move .* away to"):
        fresh.train(fresh.branch("decay", 8704, schedule=WSD, token_budget=10_500))
    assert kept.exists()


def test_branch_of_another_run_than_its_parent_is_refused(fresh: Laboratory) -> None:
    branch = fresh.branch("decay", 8704, schedule=WSD, token_budget=10_500, init_seed=1)
    with pytest.raises(ValueError, match=r"not the same run up to 8704 tokens: init_seed is 1 here, 0 there; plan the"):
        fresh.train(branch)
    shutil.copytree(fresh.files(fresh.trunk).path, fresh.folder / "another")
    as_another = {"parent": "another", "at_tokens": 8704, "kind": "decay"}
    with pytest.raises(ValueError, match=rf"is the configuration of {fresh.trunk.run_id}, not of another"):
        fresh.train(fresh.run(schedule=WSD, token_budget=10_500, branch=as_another))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, None),
        ({"stop_at_loss_nats": 2.0}, "stop_at_loss_nats is 2.0 here, None there"),
        ({"data_seed": 3}, "data_seed is 3 here, 0 there"),
        ({"averaging": {"kind": "ema"}}, "averaging.kind is ema here, power_ema there"),
        ({"optimizer": {"name": "muon", "peak_lr": 0.02, "momentum": 0.8}},
         "optimizer.momentum is 0.8 here, 0.9 there"),
        ({"optimizer": {"name": "muon", "peak_lr": 0.01, "momentum": 0.9}},
         "the learning rate of step 1 is 0.0025 here, 0.005 there"),
        ({"schedule": WSD | {"warmup_tokens": 1024}}, "the learning rate of step 1 is 0.01 here, 0.005 there"),
        ({"batch_warmup": {"stages": [{"until_tokens": 1024, "global_batch_tokens": 256}], "lr_exponent": 0.0}},
         "global_batch_tokens of step 1 is 256 here, 512 there"),
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1.0 here, None there"),
    ],
)  # fmt: skip
def test_first_difference_from_the_parent_is_named(
    laboratory: Laboratory, change: dict[str, Any], difference: str | None
) -> None:
    given = {"schedule": WSD, "token_budget": 10_500} | change
    assert difference_before(laboratory.branch("decay", 8704, **given), laboratory.trunk) == difference


def test_rate_that_rounds_is_no_difference(laboratory: Laboratory) -> None:
    """√2 times the rate at twice the batch is the parent's rate but for its last bit."""
    changes = batch_changes(6144, 1024, 0.02 * 2**0.5)
    assert difference_before(laboratory.branch("batch", 6144, token_budget=9000, **changes), laboratory.trunk) is None


def test_branch_and_schedule_enter_the_identity_and_what_is_kept_does_not() -> None:
    schedule = {"kind": "wsd"}
    branch = {"parent": "trunk", "at_tokens": 65_536, "kind": "decay"}
    plain, branched = parse(schedule=schedule), parse(schedule=schedule, branch=branch)
    assert plain.run_id != branched.run_id != parse(schedule=schedule, branch=branch | {"parent": "other"}).run_id
    assert parse(keep_at_tokens=[1024]).run_id == parse().run_id
    stages = [{"until_tokens": 65_536, "global_batch_tokens": 512}]
    assert parse(batch_warmup={"stages": stages}).run_id != parse().run_id
    assert parse(batch_warmup={"stages": stages}, branch=branch | {"kind": "batch"}).protocol == "branched_batch"
    again = RunConfig.model_validate(json.loads(branched.model_dump_json()))
    assert (again, again.run_id) == (branched, branched.run_id)


def test_stable_tokens_are_those_of_the_last_step_at_the_peak() -> None:
    """Ten steps, of which the last four decay from one step after the sixth on: the seventh is at the peak still."""
    run = parse(token_budget=10_240, schedule={"kind": "wsd", "decay_share": 0.4})
    assert (run.decay_tokens, run.stable_tokens) == (4096, 7168)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at_tokens": 65_000}, "branch.at_tokens 65000 is not the end of a step of 1024 tokens; .* 64512 and 65536"),
        ({"at_tokens": 524_288}, "branch.at_tokens 524288 is the end of the run; raise token_budget"),
        ({"at_tokens": 600_064}, "branch.at_tokens 600064 is beyond the 524288 tokens of the run"),
        ({"at_tokens": 421_888},
         "starts to decay after branch.at_tokens 421888; here the kind is wsd and 420864 the last"),
        ({"kind": "batch"},
         "kind batch changes its batch at branch.at_tokens 65536: end the last of batch_warmup.stages"),
        ({"kind": "rate"}, "branch.kind: expected 'decay' or 'batch', not 'rate'"),
        ({"parent": "../elsewhere/run"}, "branch.parent: "),
    ],
)  # fmt: skip
def test_mistakes_in_a_branch_are_named_in_one_line(change: dict[str, Any], message: str) -> None:
    branch = {"parent": "trunk", "at_tokens": 65_536, "kind": "decay"} | change
    with pytest.raises(ValueError, match=message) as caught:
        parse(schedule={"kind": "wsd"}, branch=branch)
    assert "\n" not in str(caught.value)


def test_decay_branch_of_a_constant_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is a run of schedule.kind wsd .* here the kind is constant"):
        parse(branch={"parent": "trunk", "at_tokens": 65_536, "kind": "decay"})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (1000, "keep_at_tokens 1000 is not the end of a step of 1024 tokens; the nearest are 1024"),
        (525_312, "keep_at_tokens 525312 is beyond the 524288 tokens of the run"),
        (0, "keep_at_tokens.0: expected a number above 0"),
    ],
)
def test_states_are_kept_at_whole_steps_of_the_run(tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(keep_at_tokens=[2048, tokens] if tokens else [tokens])

"""Runs whose batch is a step function of the tokens seen: counted exactly, in the same order of text, resumable."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.batch_clock import BatchClock
from harness.batch_plan import plan_run
from harness.callbacks.interruption import Interrupted
from harness.config import AveragingConfig, MachineConfig, RunConfig
from harness.data import MicroBatches
from harness.flops import forward_backward_flops_per_token, optimizer_flops_per_step
from harness.module import LanguageModel
from harness.optimizers.combined import CombinedOptimizer, build_optimizer
from harness.record import RunFolder, read_json, read_rows
from harness.schedule import averaging_weight, evaluation_marks, learning_rate_factor
from harness.train import train
from sweeps.work import work_of
from tests.runs import tiny_run
from tests.test_config import parse
from tests.test_exact_resume import Observed, assert_undisturbed
from tests.test_halving import CUDA_ERROR
from tests.test_train import MACHINE, act_in_micro_batch, science_rows, start, write_run

#: 19 steps of one micro-batch of 3 sequences, 8 of 3 of 4, 22 of 4 of 4: no stage begins at a multiple of its
#: accumulation. The budget has room for part of one more step.
STAGES = [{"until_tokens": 1824, "global_batch_tokens": 96}, {"until_tokens": 4896, "global_batch_tokens": 384}]
STEPS, TOKENS, MICRO_BATCHES = 49, 16_160, 131


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache, batch_warmup={"stages": STAGES})


@pytest.fixture(scope="module")
def undisturbed(run: RunConfig, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Observed]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        observed = Observed(patch)
        assert train(run, MACHINE, folder, cache) == "finished"
    return folder, observed


@st.composite
def clocks(draw: st.DrawFn) -> BatchClock:
    counts = st.integers(1, 40)
    stages, tokens = [], 0
    for _ in range(draw(st.integers(0, 4))):
        batch = draw(counts)
        tokens += batch * draw(counts)
        stages.append((tokens, batch))
    batch = draw(counts)
    return BatchClock(batch, tokens + batch + draw(st.integers(0, 500)), tuple(stages))


@given(clock=clocks())
def test_clock_counts_every_step_once(clock: BatchClock) -> None:
    batches = [clock.batch_at(step) for step in range(1, clock.steps + 1)]
    assert [clock.tokens_after(step) for step in range(clock.steps + 1)] == [0, *itertools.accumulate(batches)]
    assert clock.realized_tokens == sum(batches) <= clock.token_budget
    assert clock.token_budget - clock.realized_tokens < batches[-1] == clock.global_batch_tokens
    assert {until for until, _ in clock.stages} <= set(itertools.accumulate(batches))
    by_span = [span.batch_tokens for span in clock.spans() for _ in range(span.steps)]
    assert by_span == batches


@given(clock=clocks(), share=st.floats(0.0, 1.0))
def test_clock_finds_the_step_of_any_number_of_tokens(clock: BatchClock, share: float) -> None:
    tokens = int(share * clock.realized_tokens)
    within, reaching = clock.steps_within(tokens), clock.steps_reaching(tokens)
    assert clock.tokens_after(within) <= tokens < clock.tokens_after(within + 1)
    assert clock.tokens_after(reaching) >= tokens > (clock.tokens_after(reaching - 1) if reaching else -1)
    assert clock.is_step_end(tokens) == (tokens in {clock.tokens_after(step) for step in range(1, clock.steps + 1)})
    steps = [*range(clock.steps + 1)]
    assert [clock.steps_within(clock.tokens_after(step)) for step in steps] == steps


@given(clock=clocks(), ends=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_clock_spans_are_cut_at_any_steps(clock: BatchClock, ends: tuple[int, int]) -> None:
    after, until = (min(end, clock.steps) for end in sorted(ends))
    found = [
        (span.first_step + number + 1, span.batch_tokens)
        for span in clock.spans(after, until)
        for number in range(span.steps)
    ]
    assert found == [(step, clock.batch_at(step)) for step in range(after + 1, until + 1)]
    assert all(span.first_tokens == clock.tokens_after(span.first_step) for span in clock.spans(after, until))


@given(clock=clocks(), limit=st.integers(1, 50))
def test_run_plan_places_every_micro_batch(clock: BatchClock, limit: int) -> None:
    plan = plan_run(clock, 1, 1, limit)
    places = [plan.at(index) for index in range(plan.micro_batches)]
    steps = [list(group) for _, group in itertools.groupby(places, key=lambda place: place.step)]
    assert [group[0].step for group in steps] == list(range(1, clock.steps + 1))
    for group in steps:
        assert [place.number for place in group] == list(range(len(group)))
        assert [place.ends_step for place in group] == [False] * (len(group) - 1) + [True]
        assert sum(place.split.micro_batch_tokens for place in group) == clock.batch_at(group[0].step)
        assert {place.first_sequence for place in group} == {clock.tokens_after(group[0].step - 1)}
        assert plan.at(plan.micro_batches_before(group[0].step)) == group[0]
    assert plan.micro_batches_before(clock.steps + 1) == plan.micro_batches
    assert plan_run(clock, 1, 1, plan.micro_batch_tokens) == plan


@pytest.mark.parametrize("devices", [1, 2])
def test_run_with_a_schedule_reads_the_text_in_the_same_order(devices: int) -> None:
    length, tokens = 8, np.arange(1003, dtype=np.uint16)
    clocks = [BatchClock(4 * length, 240 * length, ((24 * length, 2 * length), (72 * length, 6 * length)))]
    clocks.append(BatchClock(2 * length, 240 * length))
    orders = []
    for clock in clocks:
        plan, order = plan_run(clock, length, devices, 2 * length), []
        of_devices = [MicroBatches(tokens, plan, 5, device) for device in range(devices)]
        for step in range(1, clock.steps + 1):
            for device, first in itertools.product(range(devices), [plan.micro_batches_before(step)]):
                micro_batches = range(first, plan.micro_batches_before(step + 1))
                order += [row for index in micro_batches for row in of_devices[device][index].tolist()]
        orders.append(order)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 240


def scheduled(**changes: Any) -> RunConfig:
    """Steps of 10, 10 and 20 tokens, then of 40 up to 240: eight in all."""
    given = {
        "corpus": {"source": "python-stdlib"},
        "model": {"width": 8, "layers": 1, "heads": 1, "sequence_length": 10},
        "optimizer": {"name": "adamw", "peak_lr": 1.0},
        "global_batch_tokens": 40,
        "token_budget": 240,
        "batch_warmup": {
            "stages": [
                {"until_tokens": 20, "global_batch_tokens": 10},
                {"until_tokens": 40, "global_batch_tokens": 20},
            ],
            "lr_exponent": 0.0,
        },
    }
    return RunConfig.parse(given | changes, "test")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"warmup_tokens": 80}, [0.125, 0.25, 0.5, 1, 1, 1, 1, 1]),
        ({"warmup_tokens": 30}, [0.25, 0.5, 1, 1, 1, 1, 1, 1]),  # the third step reaches 40
        ({"warmup_tokens": 10, "warmup_min_steps": 3}, [0.25, 0.5, 1, 1, 1, 1, 1, 1]),
        ({"kind": "linear"}, [1, 230 / 240, 220 / 240, 200 / 240, 160 / 240, 120 / 240, 80 / 240, 40 / 240]),
        ({"kind": "linear", "warmup_tokens": 40}, [0.25, 0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"kind": "wsd", "decay_share": 0.5}, [1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]),
        ({"kind": "wsd", "decay_share": 1.0},
         [1, 230 / 240, 220 / 240, 200 / 240, 160 / 240, 120 / 240, 80 / 240, 1 / 6]),
    ],
)  # fmt: skip
def test_learning_rate_follows_the_tokens(schedule: dict[str, Any], expected: list[float]) -> None:
    run = scheduled(schedule=schedule)
    assert run.steps == 8
    assert [learning_rate_factor(step, run) for step in range(1, 9)] == pytest.approx(expected)


def test_stage_takes_the_rate_of_its_batch() -> None:
    run = scheduled(batch_warmup=scheduled().batch_warmup.model_dump() | {"lr_exponent": 0.5})  # type: ignore[union-attr]
    assert [learning_rate_factor(step, run) for step in range(1, 6)] == pytest.approx([0.5, 0.5, 0.5**0.5, 1, 1])


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_schedule_of_one_batch_throughout_is_a_constant_batch(kind: str) -> None:
    """Bit for bit: rates, weights of the average, marks."""
    stages = {"stages": [{"until_tokens": 80, "global_batch_tokens": 40}]}
    schedule = {"kind": kind, "warmup_tokens": 70, "final_fraction": 0.1}
    runs = [scheduled(token_budget=4030, schedule=schedule, batch_warmup=given) for given in (None, stages)]
    for averaging in (AveragingConfig(kind="power_ema"), AveragingConfig(kind="ema")):
        weights = [[averaging_weight(step, averaging, run.clock) for step in range(1, 101)] for run in runs]
        assert weights[0] == weights[1]
    rates = [[learning_rate_factor(step, run) for step in range(1, 101)] for run in runs]
    assert rates[0] == rates[1]
    assert len({evaluation_marks(run.evaluation, run.clock)[-1] for run in runs}) == 1
    assert len({(run.warmup_steps, run.stable_tokens, run.realized_tokens) for run in runs}) == 1


def test_average_weighs_tokens_not_steps() -> None:
    """Of a plain mean over the tokens, each step has the share of its batch."""
    clock, averaging = BatchClock(40, 240, ((20, 10), (40, 20))), AveragingConfig(kind="ema", decay=0.999)
    keep = np.array([averaging_weight(step, averaging, clock) for step in range(1, 9)])
    later = np.append(np.cumprod(keep[::-1])[::-1][1:], 1.0)
    assert (1.0 - keep) * later == pytest.approx(np.array([10, 10, 20, 40, 40, 40, 40, 40]) / 240)


def test_marks_are_the_first_steps_past_their_tokens(run: RunConfig) -> None:
    marks = evaluation_marks(run.evaluation, run.clock)
    tokens = [run.clock.tokens_after(step) for step in marks]
    assert tokens == [0, 2208, 2976, 4128, 5920, 8480, 12064, 16160]
    assert tokens[-1] == TOKENS  # the mark of 16,384 tokens is not reached: the last step takes its place


HALF_LIVES = {"betas": [{"half_life_tokens": 3000}, {"half_life_tokens": 100_000}]}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_half_lives_follow_the_batch_and_so_does_the_correction(run: RunConfig, name: str) -> None:
    """A gradient that never changes is its own corrected mean, at any batch: each update has the size of the rate."""
    optimizer = tiny_optimizer(run, {"name": name, "peak_lr": 1.0, "weight_decay": 0.0, "eps": 1e-30, **HALF_LIVES})
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.ndim == 1]
    for step in range(1, STEPS + 1):
        before = [weight.detach().clone() for weight in weights]
        optimizer.set_learning_rate(1e-3)
        optimizer.follow_batch(run.clock, step)
        optimizer.step()
        for weight, earlier in zip(weights, before, strict=True):
            assert torch.allclose(earlier - weight, torch.full_like(weight, 1e-3), rtol=2e-3), step
    batch = run.clock.batch_at(STEPS)
    assert optimizer.param_groups[0]["betas"] == (2 ** (-batch / 3000), 2 ** (-batch / 100_000))


def test_decay_rates_in_steps_do_not_follow_the_batch(run: RunConfig) -> None:
    optimizer = tiny_optimizer(run, {"name": "muon", "peak_lr": 1.0, "momentum": {"half_life_tokens": 1000}})
    before = {group["algorithm"]: {**group} for group in optimizer.param_groups}
    optimizer.follow_batch(run.clock, 1)
    after = {group["algorithm"]: {**group} for group in optimizer.param_groups}
    assert after["adamw"] == before["adamw"]
    assert (before["muon"]["momentum"], after["muon"]["momentum"]) == (2 ** (-512 / 1000), 2 ** (-96 / 1000))


def tiny_optimizer(run: RunConfig, settings: dict[str, Any]) -> CombinedOptimizer:
    """Return the optimizer of a network whose gradients are all one."""
    changed = RunConfig.parse(run.model_dump() | {"optimizer": settings}, "test")
    module = LanguageModel(changed)
    optimizer = build_optimizer(module.network, changed.model, changed.optimizer, changed.global_batch_tokens)
    for weight in module.network.parameters():
        weight.grad = torch.ones_like(weight)
    return optimizer


def test_run_with_a_schedule_uses_its_budget_exactly(run: RunConfig, undisturbed: tuple[Path, Observed]) -> None:
    folder, observed = undisturbed
    record, rows = read_json(RunFolder(folder).run), read_rows(RunFolder(folder).evaluations)
    assert (run.steps, run.realized_tokens) == (STEPS, TOKENS)
    assert (record["step"], record["tokens_seen"], record["realized_tokens"]) == (STEPS, TOKENS, TOKENS)
    assert (record["micro_batch_tokens"], record["accumulation"]) == (128, 4)
    assert [index for index, _ in observed.read] == list(range(MICRO_BATCHES))
    assert [row["step"] for row in rows] == [0, 20, 22, 25, 29, 34, 41, 49]
    assert all(row["tokens_seen"] == run.clock.tokens_after(row["step"]) for row in rows)
    assert rows[-1]["val_loss_nats"] < rows[0]["val_loss_nats"] - 1.0
    flops = TOKENS * forward_backward_flops_per_token(run.model)
    assert rows[-1]["train_flops"] == flops + STEPS * optimizer_flops_per_step(run.model, run.optimizer)


def test_training_loss_is_the_mean_over_tokens(
    run: RunConfig, cache: Path, tmp_path: Path, undisturbed: tuple[Path, Observed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights that never move every token counts the same: micro-batches of 96 and of 128 tokens at one mark."""
    still = RunConfig.parse(run.model_dump() | {"optimizer": {"name": "sgd", "peak_lr": 1e-30}}, "test")
    observed = Observed(monkeypatch)
    train(still, MACHINE, tmp_path, cache)
    module = LanguageModel(still)
    tokens = torch.tensor(np.concatenate([np.frombuffer(read, np.int64).reshape(-1, 33) for _, read in observed.read]))
    with torch.no_grad():
        expected = float(module.loss(tokens[: 2208 // 32]))
    assert read_rows(RunFolder(tmp_path).evaluations)[1]["train_loss_nats"] == pytest.approx(expected, abs=1e-6)
    assert dict(observed.read) == dict(undisturbed[1].read)


def test_gradient_of_each_step_is_that_of_its_whole_batch(
    run: RunConfig, cache: Path, tmp_path: Path, undisturbed: tuple[Path, Observed]
) -> None:
    whole = MACHINE.model_copy(update={"max_micro_batch_tokens": 512})
    train(run, whole, tmp_path, cache)
    record = read_json(RunFolder(tmp_path).run)
    assert (record["micro_batch_tokens"], record["accumulation"]) == (512, 1)
    ours, theirs = science_rows(tmp_path), science_rows(undisturbed[0])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["val_loss_nats"] == pytest.approx(other["val_loss_nats"], abs=5e-3)
    assert ours[1]["grad_norm"] == pytest.approx(theirs[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 18, 19, 20, 21, 30, 42, 43, 44, 45, 46, 47, 100, 127])
def test_run_interrupted_in_any_stage_is_the_undisturbed_one(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[Path, Observed], micro_batch: int,
) -> None:  # fmt: skip
    observed = Observed(monkeypatch)
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, micro_batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(run, MACHINE, tmp_path, cache)
    assert train(run, MACHINE, tmp_path, cache) == "finished"
    assert read_json(RunFolder(tmp_path).run)["resumes"] == 1
    assert_undisturbed(tmp_path, observed, undisturbed)


def test_half_lives_resume_in_the_stage_where_they_were(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = {"name": "adamw", "peak_lr": 0.01, **HALF_LIVES}
    run = tiny_run(text, cache, batch_warmup={"stages": STAGES}, optimizer=optimizer)
    train(run, MACHINE, tmp_path / "whole", cache)
    for micro_batch in (25, 60):
        with monkeypatch.context() as patch:
            act_in_micro_batch(patch, micro_batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Interrupted):
                train(run, MACHINE, tmp_path / "cut", cache)
    train(run, MACHINE, tmp_path / "cut", cache)
    assert science_rows(tmp_path / "cut") == science_rows(tmp_path / "whole")


def test_memory_that_runs_out_in_a_late_stage_halves_every_micro_batch(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run, MACHINE.model_copy(update={"max_micro_batch_tokens": 64}), tmp_path / "small", cache)
    asked, training_step = [], LanguageModel.training_step

    def limited(self: LanguageModel, sequences: torch.Tensor, index: int) -> torch.Tensor:
        asked.append(sequences[:, 1:].numel())
        if asked[-1] > 96:
            raise CUDA_ERROR
        return training_step(self, sequences, index)

    monkeypatch.setattr(LanguageModel, "training_step", limited)
    assert train(run, MACHINE, tmp_path / "halved", cache) == "finished"
    record = read_json(RunFolder(tmp_path / "halved").run)
    assert (record["micro_batch_tokens"], record["accumulation"], record["micro_batch_halvings"]) == (64, 8, 1)
    assert asked[:21] == [96] * 19 + [128, 32]
    assert science_rows(tmp_path / "halved") == science_rows(tmp_path / "small")


#: Stages that divide over two devices: 29 steps of one micro-batch each, 8 of three.
EVEN = [{"until_tokens": 1856, "global_batch_tokens": 64}, {"until_tokens": 4928, "global_batch_tokens": 384}]
TWO = MACHINE.model_copy(update={"devices": 2, "max_micro_batch_tokens": 64, "checkpoint_every_seconds": 0.0})


def train_on_two(folder: Path, cache: Path) -> tuple[int, str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    output, _ = (process := start(folder, cache, *launcher)).communicate(timeout=180)
    return process.returncode, output


@pytest.mark.slow
def test_two_devices_follow_the_schedule_of_one(text: Path, cache: Path, tmp_path: Path) -> None:
    run = tiny_run(text, cache, batch_warmup={"stages": EVEN})
    train(run, MACHINE, tmp_path / "one", cache)
    write_run(tmp_path / "two", run, TWO)
    code, output = train_on_two(tmp_path / "two", cache)
    assert code == 0, output
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (record["num_devices"], record["tokens_seen"]) == (2, run.realized_tokens)
    for ours, theirs in zip(science_rows(tmp_path / "one"), science_rows(tmp_path / "two"), strict=True):
        assert (ours["step"], ours["tokens_seen"]) == (theirs["step"], theirs["tokens_seen"])
        for name in ("val_loss_nats", "val_loss_averaged_nats", "train_loss_nats"):
            if ours[name] is not None:
                assert theirs[name] == pytest.approx(ours[name], abs=5e-3), name


#: Runs in every process: each dies at the start of the micro-batch that the environment names.
_DIES = """
import os
if "RANK" in os.environ and "DIE_AT" in os.environ:
    from harness.module import LanguageModel
    step, calls = LanguageModel.training_step, []
    def training_step(self, sequences, index):
        calls.append(index)
        if len(calls) == int(os.environ["DIE_AT"]):
            os._exit(9)
        return step(self, sequences, index)
    LanguageModel.training_step = training_step
"""


@pytest.mark.slow
def test_two_devices_resume_in_any_stage_bit_for_bit(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(text, cache, batch_warmup={"stages": EVEN})
    (tmp_path / "sitecustomize.py").write_text(_DIES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}")
    for name in ("whole", "cut"):
        write_run(tmp_path / name, run, TWO)
    assert train_on_two(tmp_path / "whole", cache)[0] == 0
    for die_at in (20, 17, 20):  # in the first stage, in the second, then in the last
        monkeypatch.setenv("DIE_AT", str(die_at))
        assert train_on_two(tmp_path / "cut", cache)[0] != 0
    monkeypatch.delenv("DIE_AT")
    assert train_on_two(tmp_path / "cut", cache)[0] == 0
    assert read_json(RunFolder(tmp_path / "cut").run)["resumes"] == 3
    assert science_rows(tmp_path / "cut") == science_rows(tmp_path / "whole")


def test_work_counts_what_a_run_with_a_schedule_does(run: RunConfig, undisturbed: tuple[Path, Observed]) -> None:
    work = work_of(run, MachineConfig(max_micro_batch_tokens=128))
    rows = read_rows(RunFolder(undisturbed[0]).evaluations)
    assert (work.steps, work.realized_tokens, work.micro_batches) == (STEPS, TOKENS, MICRO_BATCHES)
    assert work.train_flops == rows[-1]["train_flops"]
    assert work.evaluation_tokens == 2 * 2048 * len(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([(2048, 512), (2048, 256)], r"batch_warmup: stages.1.until_tokens 2048 does not come after 2048; sort"),
        ([(2048, 512), (1024, 256)], r"stages.1.until_tokens 1024 does not come after 2048"),
        ([(2000, 512)],
         r"stages.0.until_tokens 2000 is not the end of a step: steps of 512 .* at 0; take 1536 and 2048"),
        ([(100, 512)], r"stages.0.until_tokens 100 is not the end .* take 512"),
        ([(2048, 512), (2600, 256)], r"stages.1.* 2600 .* of 256 tokens begin at 2048; take 2560 and 2816"),
        ([(2000, 1000)], r"global_batch_tokens 1000 is not a whole number of sequences of 64"),
        ([(524_288, 512)],
         r"token_budget 524288 is smaller than one global batch of 1024 tokens after the 524288 of its"),
        ([], r"batch_warmup.stages: expected a list of at least 1"),
        ([(0, 512)], r"stages.0.until_tokens: expected a number above 0"),
    ],
)  # fmt: skip
def test_mistakes_in_a_schedule_are_named_in_one_line(change: list[tuple[int, int]], message: str) -> None:
    stages = [{"until_tokens": until, "global_batch_tokens": batch} for until, batch in change]
    with pytest.raises(ValueError, match=message) as caught:
        parse(batch_warmup={"stages": stages})
    assert "\n" not in str(caught.value)


def test_stage_that_does_not_divide_over_the_devices_is_refused(run: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"batch of 3 sequences .96 tokens. does not divide over 2 devices"):
        plan_run(run.clock, 32, 2, 2048)


def test_half_life_beside_a_rate_per_step_is_refused_with_a_schedule() -> None:
    optimizer = {"name": "adamw", "peak_lr": 0.01, "betas": [0.9, {"half_life_tokens": 1000}]}
    stages = {"stages": [{"until_tokens": 2048, "global_batch_tokens": 512}]}
    assert parse(optimizer=optimizer).steps == 512
    with pytest.raises(ValueError, match=r"betas .* are both rates per step or both half-lives where the batch"):
        parse(optimizer=optimizer, batch_warmup=stages)

"""The stream: the same tokens in the same order for every batch size, split over devices, and after every resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from harness.batch_clock import BatchClock
from harness.batch_plan import BatchPlan, RunPlan, plan_batch, plan_run
from harness.config import RunConfig
from harness.corpus import Corpus, count_windows, prepare
from harness.data import MicroBatches, ResumedOrder, TokenStream, validation_batches
from harness.shards import open_shard
from harness.shuffle import window_index
from tests.runs import tiny_run

LENGTH = 8
TOKENS = np.arange(1003, dtype=np.uint16)  # every window says where it was taken: 125 windows, 2 tokens left over


def stream_of(plan: BatchPlan, steps: int, data_seed: int = 0) -> list[list[int]]:
    """Read a whole run of all devices back in the order of the stream: step by step, device by device."""
    devices = [MicroBatches(TOKENS, of_steps(plan, steps), data_seed, index) for index in range(plan.devices)]
    rows = []
    for step in range(steps):
        for batches in devices:
            for micro_batch in range(plan.accumulation):
                rows += batches[step * plan.accumulation + micro_batch].tolist()
    return rows


def of_steps(plan: BatchPlan, steps: int = 1) -> RunPlan:
    """Return the plan of a run of steps that are all alike."""
    batch = plan.global_batch_tokens
    return plan_run(BatchClock(batch, steps * batch), LENGTH, plan.devices, plan.micro_batch_tokens)


@pytest.mark.parametrize("global_sequences", [2, 6, 12, 30])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("max_micro_batch_sequences", [1, 2, 1000])
def test_every_batch_size_sees_the_same_tokens_in_the_same_order(
    global_sequences: int, devices: int, max_micro_batch_sequences: int
) -> None:
    plan = plan_batch(global_sequences * LENGTH, LENGTH, devices, max_micro_batch_sequences * LENGTH)
    order = window_index(np.arange(240), len(TOKENS) // LENGTH, seed=5)
    expected = [list(range(window * LENGTH, window * LENGTH + LENGTH + 1)) for window in order]
    steps = 240 // global_sequences  # nearly two epochs of 125 windows
    assert stream_of(plan, steps, data_seed=5) == expected[: steps * global_sequences]


def test_an_epoch_reads_every_window_once() -> None:
    first_tokens = [row[0] for row in stream_of(plan_batch(5 * LENGTH, LENGTH, 1, 5 * LENGTH), steps=25)]
    assert sorted(first_tokens) == list(range(0, 1000, LENGTH))


def test_data_seeds_give_different_orders() -> None:
    plan = plan_batch(10 * LENGTH, LENGTH, 1, 10 * LENGTH)
    assert stream_of(plan, 10, data_seed=0) != stream_of(plan, 10, data_seed=1)


@pytest.mark.parametrize(("tokens", "windows"), [(9, 1), (16, 1), (17, 2), (1000, 124), (1001, 125), (1003, 125)])
def test_windows_are_counted_as_they_are_read(tokens: int, windows: int) -> None:
    plan = of_steps(plan_batch(windows * LENGTH, LENGTH, 1, windows * LENGTH))
    batches = MicroBatches(TOKENS[:tokens], plan, data_seed=0)
    assert count_windows(tokens, LENGTH) == windows
    assert sorted(batches[0][:, 0].tolist()) == [LENGTH * window for window in range(windows)]


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4"])
def test_micro_batches_are_whole_numbers_of_64_bits_from_any_shard(dtype: str, tmp_path: Path) -> None:
    np.full(100, 200, dtype).tofile(tmp_path / "train.bin")
    tokens = np.memmap(tmp_path / "train.bin", np.dtype(dtype), mode="r")
    batch = MicroBatches(tokens, of_steps(plan_batch(3 * LENGTH, LENGTH, 1, 3 * LENGTH)), data_seed=0)[0]
    assert (batch.dtype, batch.shape, batch.unique().tolist()) == (torch.int64, (3, LENGTH + 1), [200])


def test_resumed_order_starts_late_but_has_the_length_of_the_whole_run() -> None:
    order = ResumedOrder(10, lambda: 7)
    assert len(order) == 10
    assert list(order) == [7, 8, 9]


class Recorder(LightningModule):
    """Train one weight and note every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        return self.weight * tokens.float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Save in the middle of a run, at the boundary of a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(stream: TokenStream, callback: Callback, ckpt_path: Path | None = None) -> list[Tensor]:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        max_epochs=1,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Recorder()
    trainer.fit(module, datamodule=stream, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_resumed_run_reads_on_where_it_stopped(text: Path, cache: Path, tmp_path: Path) -> None:
    run = tiny_run(text, cache, token_budget=512 * 6, schedule={"warmup_tokens": 0})
    corpus = prepare(run.corpus, cache)
    stream = TokenStream(corpus, run, plan_run(run.clock, 32, devices=1, max_micro_batch_tokens=256))
    whole = fit(stream, SaveAt(4, tmp_path / "checkpoint.ckpt"))
    resumed = fit(stream, Callback(), tmp_path / "checkpoint.ckpt")
    assert (len(whole), len(resumed)) == (12, 4)
    assert torch.equal(torch.cat(whole[8:]), torch.cat(resumed))
    assert torch.equal(whole[0], MicroBatches(open_shard(corpus.folder, "train"), stream._plan, 0)[0])


@pytest.fixture
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache, evaluation={"tokens": 32 * 10})


@pytest.fixture
def corpus(run: RunConfig, cache: Path) -> Corpus:
    return prepare(run.corpus, cache)


@pytest.mark.parametrize("micro_batch_sequences", [1, 3, 10, 64])
def test_validation_is_the_same_for_every_micro_batch(
    micro_batch_sequences: int, run: RunConfig, corpus: Corpus
) -> None:
    tokens = open_shard(corpus.folder, "validation")
    windows = count_windows(len(tokens), 32)
    expected = [tokens[start : start + 33].tolist() for start in (i * windows // 10 * 32 for i in range(10))]
    batches = validation_batches(corpus, run, micro_batch_sequences)
    assert torch.cat(batches).tolist() == expected
    assert {len(batch) for batch in batches[:-1]} <= {micro_batch_sequences}


def test_validation_does_not_depend_on_batch_or_seed(run: RunConfig, corpus: Corpus) -> None:
    other = run.model_copy(update={"data_seed": 9, "init_seed": 9, "global_batch_tokens": 1024})
    for one, same in zip(validation_batches(corpus, run, 4), validation_batches(corpus, other, 4), strict=True):
        assert torch.equal(one, same)


def test_validation_reaches_the_end_of_its_split(run: RunConfig, corpus: Corpus) -> None:
    windows = count_windows(corpus.validation_tokens, 32)
    all_of_it = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"tokens": windows * 32})})
    rows = torch.cat(validation_batches(corpus, all_of_it, 64))
    assert rows[:, :-1].flatten().tolist() == open_shard(corpus.folder, "validation")[: windows * 32].tolist()


def test_validation_in_parts_of_sequences_is_refused(run: RunConfig, corpus: Corpus) -> None:
    odd = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"tokens": 33})})
    with pytest.raises(ValueError, match=r"evaluation.tokens 33 is not a whole number of sequences of 32 tokens"):
        validation_batches(corpus, odd, 4)

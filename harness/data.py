"""The stream of training data: a pure function of (corpus, data seed, position).

The training split is cut into windows of sequence_length + 1 tokens that start every `sequence_length` tokens: inputs
are a window without its last token, targets without its first. Sequence i of a data seed is the same in every run,
whatever its batch sizes, the devices and the accumulation, so that a resume needs the step alone.

Shapes: n sequences of a micro-batch, L = sequence_length.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.batch_plan import RunPlan
from harness.config import RunConfig
from harness.corpus import Corpus, count_evaluation_windows
from harness.failures import reading_the_corpus
from harness.shards import Tokens, open_shard
from harness.shuffle import window_index


class MicroBatches(Dataset[Tensor]):
    """Item k: tokens (n, L + 1), int64, of one device in its k-th micro-batch of the run.

    Step s takes the next G sequences of the stream, its batch, device r the r-th equal part of them, a micro-batch the
    next n of that.
    """

    def __init__(self, tokens: Tokens, plan: RunPlan, data_seed: int, device_index: int = 0) -> None:
        self._windows = _windows(tokens, plan.final.sequence_length)
        self._plan = plan
        self._data_seed = data_seed
        self._device_index = device_index

    def __len__(self) -> int:
        return self._plan.micro_batches

    def __getitem__(self, index: int) -> Tensor:
        place = self._plan.at(index)
        of_step = self._device_index * place.split.accumulation + place.number
        first = place.first_sequence + of_step * place.split.micro_batch_sequences
        positions = np.arange(first, first + place.split.micro_batch_sequences)
        return _read(self._windows, window_index(positions, len(self._windows), self._data_seed))


class TokenStream(LightningDataModule):
    """The micro-batches of a run, from the step that the trainer stands at."""

    def __init__(self, corpus: Corpus, run: RunConfig, plan: RunPlan) -> None:
        super().__init__()
        self._corpus = corpus
        self._run = run
        self._plan = plan

    def train_dataloader(self) -> DataLoader[Tensor]:
        trainer = self.trainer
        assert trainer is not None, "the stream starts where its trainer stands"
        with reading_the_corpus():
            tokens = open_shard(self._corpus.folder, "train")
        batches = MicroBatches(tokens, self._plan, self._run.data_seed, device_index=trainer.global_rank)
        sampler = ResumedOrder(len(batches), lambda: self._plan.micro_batches_before(trainer.global_step + 1))
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return DataLoader(batches, batch_size=None, sampler=sampler, num_workers=0, pin_memory=on_gpu)


class ResumedOrder(Sampler[int]):
    """The indices from `start()` on, in order; the length is that of the whole run, as Lightning counts it."""

    def __init__(self, length: int, start: Callable[[], int]) -> None:
        self._length = length
        self._start = start

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._start(), self._length))


def validation_batches(corpus: Corpus, run: RunConfig, micro_batch_sequences: int) -> list[Tensor]:
    """Return evaluation.tokens of validation text, in batches of tokens (n, L + 1); the last may be smaller.

    The windows are spread evenly over the split and are the same for every batch size and seed.

    Raises: ValueError when evaluation.tokens is no whole number of sequences or more than the split holds.
    """
    count = count_evaluation_windows(corpus, run)
    windows = _windows(open_shard(corpus.folder, "validation"), run.model.sequence_length)
    tokens = _read(windows, np.arange(count) * len(windows) // count)
    return list(torch.split(tokens, micro_batch_sequences))


def _windows(tokens: Tokens, sequence_length: int) -> NDArray[Any]:
    """View tokens (N,) as windows ((N - 1) // L, L + 1) that share their ends; copies nothing."""
    return sliding_window_view(tokens, sequence_length + 1)[::sequence_length]


def _read(windows: NDArray[Any], index: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(windows[index].astype(np.int64))

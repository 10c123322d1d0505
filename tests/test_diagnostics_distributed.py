"""What two processes measure together: gradients of micro-batches and of ranks, momenta that each keeps some of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.batch_plan import plan_run
from harness.callbacks.diagnostics.groups import squares
from harness.config import MachineConfig, RunConfig
from harness.corpus import prepare
from harness.data import MicroBatches
from harness.module import LanguageModel
from harness.record import DIAGNOSTIC_COLUMNS, RunFolder, read_rows
from harness.shards import open_shard
from sweeps.store import State
from sweeps.worker import attempt
from tests.runs import tiny_run
from tests.test_train import MACHINE, science_rows, write_run

pytestmark = pytest.mark.slow

TWO = MACHINE.model_copy(update={"devices": 2, "max_micro_batch_tokens": 128})
SHAPE: dict[str, Any] = {
    "token_budget": 4096,
    "evaluation": {"tokens": 1024, "first_mark_tokens": 512, "marks_per_doubling": 1},
    "schedule": {},
    "optimizer": {"name": "muon", "peak_lr": 0.02, "newton_schulz_dtype": "float32"},
}
MEASURED = {"noise_scale": True, "update_norms": True, "spectra": True, "sharpness": True, "sharpness_tokens": 64}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def trained(path: Path, run: RunConfig, machine: MachineConfig) -> Path:
    write_run(path, run, machine)
    assert attempt(RunFolder(path), "harness.train:train") == State.FINISHED, RunFolder(path).log.read_text()
    return path


def measurements(path: Path) -> dict[tuple[Any, ...], Any]:
    rows = read_rows(RunFolder(path).diagnostics, DIAGNOSTIC_COLUMNS)
    return {(row["step"], row["quantity"], row["group"]): row for row in rows}


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache, **SHAPE, diagnostics=MEASURED)


def test_two_ranks_measure_the_noise_of_their_micro_batches_and_of_their_own(
    run: RunConfig, text: Path, cache: Path, tmp_path: Path
) -> None:
    together = trained(tmp_path / "two", run, TWO)
    plain = trained(tmp_path / "plain", tiny_run(text, cache, **SHAPE), TWO)
    assert science_rows(together) == science_rows(plain)
    found = measurements(together)
    module = LanguageModel(run)
    plan = plan_run(run.clock, run.model.sequence_length, 1, 512)
    batch = MicroBatches(open_shard(prepare(run.corpus, cache).folder, "train"), plan, run.data_seed)[0]
    weights = list(module.network.parameters())

    def mean_square(sequences: int) -> float:
        gradients = [torch.autograd.grad(module.loss(part), weights) for part in batch.split(sequences)]
        return float(np.mean([float(squares(each).sum()) for each in gradients]))

    for estimator, sequences in (("micro_batches", 4), ("ranks", 8)):
        row = found[1, f"noise_scale_{estimator}", "all"]
        small, big, part = mean_square(sequences), mean_square(16), sequences / 16
        assert (row["small_batch_tokens"], row["big_batch_tokens"]) == (32 * sequences, 512)
        assert row["signal"] == pytest.approx((big - part * small) / (1 - part), rel=1e-3)
        assert row["noise"] == pytest.approx((small - big) / (1 / (32 * sequences) - 1 / 512), rel=1e-3)


def test_two_ranks_measure_updates_and_momenta_as_one_does(run: RunConfig, tmp_path: Path) -> None:
    two = measurements(trained(tmp_path / "two", run, TWO))
    one = measurements(trained(tmp_path / "one", run, TWO.model_copy(update={"devices": 1})))
    shared = [key for key in one if not str(key[1]).startswith("noise_scale")]
    assert any(str(quantity).startswith("momentum") for _, quantity, _ in shared)
    for key in shared:
        sensitive = "singular_value_p0" in str(key[1]) or "sharpness" in str(key[1])
        tolerance = 5e-2 if sensitive else 5e-3
        assert two[key]["value"] == pytest.approx(one[key]["value"], rel=tolerance, abs=2e-4), key

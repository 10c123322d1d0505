"""What only a GPU can show: bfloat16, resumption, batched Newton–Schulz, compilation and want of memory there."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.callbacks.interruption import Interrupted
from harness.config import MachineConfig, RunConfig
from harness.module import LanguageModel
from harness.optimizers import newton_schulz
from harness.record import RunFolder, read_json, read_rows
from harness.train import train
from tests.runs import tiny_run
from tests.test_train import act_in_micro_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here"),
]

MACHINE = MachineConfig(accelerator="gpu", max_micro_batch_tokens=512)

#: By how much a loss may differ after kernels have added up the same numbers in another order: losses of the tiny run
#: in bfloat16, which falls by about 4.
TOLERANCE_NATS = 0.02


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache, precision="bf16")


@pytest.fixture(scope="module")
def finished(run: RunConfig, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    files = RunFolder(tmp_path_factory.mktemp("gpu") / "run")
    assert train(run, MACHINE, files.path, cache) == "finished"
    return files


def losses(files: RunFolder) -> list[float]:
    return [row[name] for row in read_rows(files.evaluations) for name in ("val_loss_nats", "val_loss_averaged_nats")]


def test_bf16_training_learns_and_the_record_names_the_device(finished: RunFolder) -> None:
    first, *_, last = read_rows(finished.evaluations)
    assert last["val_loss_nats"] < first["val_loss_nats"] - 1.0
    assert last["train_cpu_seconds"] is None
    row = read_json(finished.run)
    assert row["device"] == torch.cuda.get_device_name()
    assert (row["cuda_version"], row["precision"]) == (torch.version.cuda, "bf16")
    assert row["driver"] is not None


def test_resumed_run_has_the_losses_of_the_undisturbed_one(
    run: RunConfig, cache: Path, finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 14, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="after step 14"):
            train(run, MACHINE, tmp_path, cache)
    assert train(run, MACHINE, tmp_path, cache) == "finished"
    assert losses(RunFolder(tmp_path)) == pytest.approx(losses(finished), abs=TOLERANCE_NATS)


def test_compiled_run_has_the_losses_of_the_uncompiled_one(
    run: RunConfig, cache: Path, finished: RunFolder, tmp_path: Path
) -> None:
    assert train(run, MACHINE.model_copy(update={"compile": True}), tmp_path, cache) == "finished"
    assert read_json(RunFolder(tmp_path).run)["compiled"] is True
    assert losses(RunFolder(tmp_path)) == pytest.approx(losses(finished), abs=TOLERANCE_NATS)


def updated(run: RunConfig) -> list[torch.Tensor]:
    """Return the changes of the weights in one step on gradients that are the same at every call."""
    module = LanguageModel(run).cuda()
    optimizer = module.configure_optimizers()
    optimizer.set_learning_rate(1.0)
    generator = torch.Generator(device="cuda").manual_seed(0)
    weights = [weight for weight in module.network.parameters() if weight.ndim == 2]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, device="cuda", generator=generator)
    optimizer.step()
    return [weight.detach() - old for weight, old in zip(weights, before, strict=True)]


def test_newton_schulz_of_a_batch_is_that_of_each_matrix(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    batched = updated(run)
    monkeypatch.setitem(newton_schulz.BATCHED_BELOW, "cuda", 0)
    for ours, alone in zip(batched, updated(run), strict=True):
        assert (ours - alone).norm() < 0.02 * alone.norm()  # bfloat16 keeps 8 bits


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let PyTorch have 256 MiB: its own workspace, and some 20,000 tokens of the tiny model."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**28 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
def test_run_that_is_too_large_starts_anew_with_half_the_micro_batch(text: Path, cache: Path, tmp_path: Path) -> None:
    run = tiny_run(text, cache, global_batch_tokens=2**18, token_budget=2**19, schedule={})
    run = run.model_copy(update={"corpus": run.corpus.model_copy(update={"max_epochs": 10.0})})
    machine = MACHINE.model_copy(update={"max_micro_batch_tokens": 2**18})
    assert train(run, machine, tmp_path, cache) == "finished"
    row = read_json(RunFolder(tmp_path).run)
    assert row["micro_batch_halvings"] >= 1
    assert row["micro_batch_tokens"] * row["accumulation"] == row["global_batch_tokens"] == 2**18

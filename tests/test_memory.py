"""What `plan` says of memory and disk, held to what PyTorch keeps and what a checkpoint takes."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from harness.callbacks.interruption import AtomicCheckpointIO
from harness.config import ModelConfig
from harness.memory import FLOAT32, activation_bytes_per_token, checkpoint_bytes, device_memory
from harness.model import Transformer
from harness.module import LanguageModel
from harness.train import train
from tests.runs import tiny_run
from tests.test_train import EVERY_STEP

TOKENS = 2048


def peak_bytes(network: Transformer, sequences: torch.Tensor, precision: str, trace: Path) -> int:
    """Return the most that PyTorch's allocator has handed out at once during forward and backward, beyond weights,
    their casts and gradients.
    """
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with autocast:
            logits = network(sequences[:, :-1]).flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, sequences[:, 1:].flatten())
            del logits
        loss.backward()
    profiler.export_chrome_trace(str(trace))
    events = [each["args"] for each in json.loads(trace.read_text())["traceEvents"] if each.get("name") == "[memory]"]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    casts = sum(2 * weight.numel() for weight in network.parameters()) if precision == "bf16" else 0
    return int(max(each["Total Allocated"] for each in events)) - before - casts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"norm": "layernorm"},
        {"activation": "swiglu", "mlp_width": 160},
        {"activation": "gelu", "qk_norm": False, "mlp_width": 96},
        {"norm": "layernorm", "qk_norm": False, "kv_heads": 1},
        {"kv_heads": 1, "vocab_size": 2000},
    ],
)
def test_activations_are_what_the_allocator_hands_out_at_the_peak(
    tmp_path: Path, shape: dict[str, Any], precision: str
) -> None:
    base = {"width": 64, "layers": 3, "heads": 2, "sequence_length": 128, "vocab_size": 200}
    model = ModelConfig.parse(base | shape, "test")
    sequences = torch.randint(model.known_vocab_size, (TOKENS // 128, 129))
    measured = peak_bytes(Transformer(model), sequences, precision, tmp_path / "trace.json")
    assert activation_bytes_per_token(model, precision) * TOKENS == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("averaging", ["none", "power_ema"])
def test_checkpoint_takes_what_is_said(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, averaging: str
) -> None:
    """Beyond the tensors, a checkpoint has some hundred bytes for each of them."""
    sizes, save = [], AtomicCheckpointIO.save_checkpoint

    def weigh(self: AtomicCheckpointIO, checkpoint: Any, path: Any, **options: Any) -> None:
        save(self, checkpoint, path, **options)
        sizes.append(Path(path).stat().st_size)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", weigh)
    model = {"width": 128, "layers": 2, "heads": 2, "sequence_length": 32, "norm": "layernorm"}
    settings = {"optimizer": {"name": optimizer, "peak_lr": 0.01}, "averaging": {"kind": averaging}}
    run = tiny_run(text, cache, model=model, token_budget=1024, schedule={}, **settings)
    train(run, EVERY_STEP, tmp_path, cache)
    assert sizes[-1] == pytest.approx(checkpoint_bytes(run), rel=0.03)


def test_memory_counts_every_copy_of_the_weights(text: Path, cache: Path) -> None:
    run = tiny_run(text, cache, optimizer={"name": "adamw", "peak_lr": 0.01})
    memory = device_memory(run, 128, 1)
    weights = FLOAT32 * sum(weight.numel() for weight in LanguageModel(run).network.parameters())
    assert (memory.parameters, memory.gradients, memory.optimizer_state, memory.copies) == (
        weights, weights, 2 * weights, 2 * weights,
    )  # fmt: skip
    assert memory.total == 6 * weights + 128 * activation_bytes_per_token(run.model, "fp32")
    assert device_memory(run, 256, 1).activations == 2 * memory.activations

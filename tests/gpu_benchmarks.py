"""What a training step takes on this machine's GPU: `python -m tests.gpu_benchmarks [--json FILE] [--peak FLOPS]`.

Models of 5 and 124 million parameters in bfloat16, by AdamW and by Muon, with and without torch.compile: seconds of a
step of one micro-batch, tokens a second, model FLOPs utilisation (forward and backward over the device's peak), and the
share of the step that Muon's matrix products take. `--tiny` does the same with shapes that a processor can train, to
see that it works.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness.config import CorpusConfig, MachineConfig, RunConfig
from harness.corpus import Corpus, prepare
from harness.flops import forward_backward_flops_per_token
from harness.timing import time_step

#: Dense bfloat16 FLOP/s, by a part of the device's name. Source: NVIDIA's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}

#: Preset, vocabulary, tokens of a micro-batch.
MODELS = [("5m", 256, 65_536), ("124m", 50_304, 32_768)]
TINY_MODELS = [("115k", 256, 1024)]

COLUMNS = ("model", "optimizer", "compiled", "step_ms", "tokens_per_second", "mfu", "muon_share", "peak_gib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, without torch.compile: for a processor")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--peak", type=float, help="FLOP/s of the device, where its name does not tell")
    parser.add_argument("--repeats", type=int, default=30, help="steps that are timed")
    options = parser.parse_args()
    print("  ".join(f"{name:>17}" for name in COLUMNS))
    rows = []
    for row in measured(options.tiny, options.peak or peak_flops(), options.repeats):
        rows.append(row)
        print("  ".join(f"{shown(row[name]):>17}" for name in COLUMNS), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measured(tiny: bool, peak: float | None, repeats: int) -> Iterator[dict[str, Any]]:
    corpus_config = CorpusConfig(source="python-stdlib", tokenizer="bytes")
    corpus = prepare(corpus_config)
    for preset, vocabulary, tokens in TINY_MODELS if tiny else MODELS:
        for optimizer in ("adamw", "muon"):
            run = benchmark_run(corpus_config, corpus, preset, vocabulary, optimizer, tokens)
            for compiled in (False,) if tiny else (False, True):
                machine = MachineConfig(accelerator="cpu" if tiny else "gpu", compile=compiled)
                yield measure(run, machine, corpus, peak, repeats)


def measure(run: RunConfig, machine: MachineConfig, corpus: Corpus, peak: float | None, repeats: int) -> dict[str, Any]:
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    tokens = run.global_batch_tokens
    timing = time_step(run, machine, corpus, tokens, repeats)
    seconds = float(timing["micro_batch_seconds"] or 0) + float(timing["optimizer_seconds"] or 0)
    flops = tokens * forward_backward_flops_per_token(run.model)
    return timing | {
        "compiled": machine.compile,
        "torch": torch.__version__,
        "step_ms": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / peak if peak else None,
        "muon_share": float(timing["matrix_seconds"] or 0) / seconds if run.optimizer.name == "muon" else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def benchmark_run(
    config: CorpusConfig, corpus: Corpus, preset: str, vocabulary: int, optimizer: str, tokens: int
) -> RunConfig:
    known = {"fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size, "max_epochs": 1e6}
    return RunConfig.parse(
        {
            "corpus": config.model_dump() | known,
            "model": {"preset": preset, "vocab_size": vocabulary},
            "optimizer": {"name": optimizer, "peak_lr": 0.001},
            "global_batch_tokens": tokens,
            "token_budget": tokens,
            "precision": "bf16",
        },
        "benchmark",
    )


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def shown(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    main()

"""Configurations that the tests train: seconds on one core, real code paths."""

from pathlib import Path
from typing import Any

from harness.config import CorpusConfig, RunConfig
from harness.corpus import prepare

TINY: dict[str, Any] = {
    "model": {"width": 32, "layers": 2, "heads": 2, "sequence_length": 32, "norm": "layernorm"},
    "optimizer": {"name": "muon", "peak_lr": 0.02, "momentum": 0.9},
    "global_batch_tokens": 512,
    "token_budget": 16_384,
    "schedule": {"warmup_tokens": 2048},
    "averaging": {"kind": "power_ema"},
    "evaluation": {"tokens": 2048, "first_mark_tokens": 2048, "marks_per_doubling": 2},
}


def write_text(folder: Path, files: int = 40) -> Path:
    """Write a small text corpus with some structure to learn, about 80,000 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [f"value_{(number * 7 + line) % 13} = {line % 10} + {number % 10}\n" for line in range(110)]
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


def tiny_run(text: Path, cache: Path, **changes: Any) -> RunConfig:
    """Return TINY with `changes` at its top level, on the text of `write_text`, prepared in `cache`."""
    corpus = CorpusConfig(source="text", paths=(str(text / "*.txt"),), tokenizer="ascii", validation_share=0.1)
    prepared = prepare(corpus, cache)
    resolved = corpus.model_copy(update={"fingerprint": prepared.fingerprint, "vocab_size": prepared.vocab_size})
    given = TINY | changes
    given = given | {"model": given["model"] | {"vocab_size": prepared.vocab_size}}
    return RunConfig.parse(given | {"corpus": resolved.model_dump()}, "tiny run")

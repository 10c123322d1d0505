"""`critbatch coord-check`: a few steps of models of several widths, and how sizes grow with the width."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import polars as pl
import yaml

from harness.config import CorpusConfig, RunConfig
from harness.corpus import Corpus
from sweeps.grid import with_corpus

#: Small enough for the part of an update that is linear in it to be what is seen.
_RATES = {"adamw": 3e-5, "lion": 3e-5, "lamb": 3e-3, "muon": 2e-3, "scion": 1e-4}

_SEQUENCE_TOKENS = 64
_BATCH_TOKENS = 1024
_LAYERS = 2


def check_runs(
    optimizers: Sequence[str],
    parametrizations: Sequence[str],
    widths: Sequence[int],
    head_width: int,
    steps: int,
    seeds: int,
    corpus: CorpusConfig,
) -> list[tuple[dict[str, Any], RunConfig]]:
    """Return the runs with the columns that name them. Raises: ValueError for what no run may have."""
    combinations = product(
        [(text, read_optimizer(text)) for text in optimizers], parametrizations, widths, range(seeds)
    )
    found = []
    for (text, optimizer), kind, width, seed in combinations:
        parametrization = {"kind": kind} | ({"base_width": min(widths)} if kind == "mup" else {})
        shape = {"width": width, "heads": _heads(width, head_width), "parametrization": parametrization}
        names = {"optimizer": text, "parametrization": kind, "width": width, "seed": seed}
        found.append((names, _run(optimizer, shape, steps, seed, corpus)))
    return found


def read_optimizer(text: str) -> dict[str, Any]:
    """Read `name` or `name,key=value,key=value`. Raises: ValueError for what is not of that form."""
    name, *settings = text.split(",")
    optimizer: dict[str, Any] = {"name": name, "peak_lr": _RATES.get(name, 1e-3), "weight_decay": 0.0}
    if name in ("muon", "scion"):
        optimizer["newton_schulz_dtype"] = "float32"
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise ValueError(f"--optimizer {text}: expected NAME,KEY=VALUE, as in --optimizer muon,scale=spectral")
        optimizer[key] = yaml.safe_load(value)
    return optimizer


def measure(runs: Sequence[tuple[dict[str, Any], RunConfig]], corpus: Corpus) -> pl.DataFrame:
    """Return a row per layer of every run: the columns that name the run, then those of `LayerSizes`."""
    return pl.DataFrame(list(_rows(runs, corpus)))


def _rows(runs: Sequence[tuple[dict[str, Any], RunConfig]], corpus: Corpus) -> Iterator[dict[str, Any]]:
    from harness.coordinates import layer_sizes

    for names, run in runs:
        for sizes in layer_sizes(with_corpus(run, corpus), corpus):
            yield names | sizes._asdict()


def _run(optimizer: dict[str, Any], shape: dict[str, Any], steps: int, seed: int, corpus: CorpusConfig) -> RunConfig:
    content = {
        "corpus": corpus.model_dump(),
        "model": shape | {"layers": _LAYERS, "sequence_length": _SEQUENCE_TOKENS},
        "optimizer": optimizer,
        "global_batch_tokens": _BATCH_TOKENS,
        "token_budget": steps * _BATCH_TOKENS,
        "init_seed": seed,
        "data_seed": seed,
    }
    return RunConfig.parse(content, source=f"coord-check, width {shape['width']}")


def _heads(width: int, head_width: int) -> int:
    if width % head_width:
        raise ValueError(f"--widths {width} is not a multiple of --head-width {head_width}")
    return width // head_width

"""A small sweep to take apart, and a corpus that needs no text."""

import json
from pathlib import Path
from typing import Any

import yaml

from harness.config import CorpusConfig
from harness.corpus import Corpus
from sweeps.grid import expand
from sweeps.spec import SweepSpec
from sweeps.store import SweepFolder, write_sweep

CORPUS = Corpus(Path("shards"), "f" * 16, 128, train_tokens=1_000_000, validation_tokens=50_000, bytes_per_token=1.0)

SWEEP: dict[str, Any] = {
    "name": "small",
    "base": {
        "corpus": {"source": "python-stdlib", "tokenizer": "ascii"},
        "model": {"preset": "115k"},
        "schedule": {"warmup_tokens": 1024},
    },
    "optimizers": {"adamw": {"learning_rate": [0.01]}, "muon": {"momentum": 0.9, "learning_rate": [0.02]}},
    "grid": {"global_batch_tokens": [256, 1024]},
    "token_budget": 16384,
    "targets_nats": [2.5],
}


def changed(**keys: Any) -> dict[str, Any]:
    """Return SWEEP with some keys replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(SWEEP))
    return copy | keys


def prepared(_: CorpusConfig) -> Corpus:
    return CORPUS


def write_yaml(folder: Path, content: dict[str, Any], name: str = "small.yaml") -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def started(path: Path, **keys: Any) -> SweepFolder:
    """Write the sweep's folder, as `critbatch run` does before it trains."""
    folder = SweepFolder(path)
    spec = SweepSpec.parse(changed(**keys), source="small")
    write_sweep(spec, expand(spec, prepared), folder)
    return folder

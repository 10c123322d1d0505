"""Small text corpora, and what became of them."""

from pathlib import Path

from harness.config import CorpusConfig
from harness.corpus import Corpus
from harness.shards import open_shard

SHARE = 0.3


def write_texts(folder: Path, count: int = 20) -> CorpusConfig:
    for number in range(count):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {number}\n" * (number + 1))
    return CorpusConfig(source="text", paths=(f"{folder}/**/*.txt",), validation_share=SHARE)


def split_documents(corpus: Corpus) -> dict[str, list[bytes]]:
    return {split: open_shard(corpus.folder, split).tobytes().split(b"\0")[:-1] for split in ("train", "validation")}


def visible(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")

"""From text to shards: what is a document, which split it falls in, and that nothing half-built is ever seen."""

import fcntl
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

import harness.corpus
from harness.config import CorpusConfig, EvaluationConfig, ModelConfig, RunConfig
from harness.corpus import Corpus, check_budget, default_cache, prepare
from harness.documents import is_validation, source_files
from harness.optimizers.config import AdamWConfig
from harness.shards import read_index
from tests.texts import SHARE, split_documents, visible, write_texts


def test_every_document_is_whole_in_one_split_and_ends_with_a_separator(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text")
    found = split_documents(prepare(config, tmp_path / "cache"))
    for split, texts in found.items():
        names = [
            file for file in source_files(config) if is_validation(file.name.encode(), SHARE) == (split != "train")
        ]
        assert texts == [file.path.read_bytes() for file in names]
    assert len(found["train"]) + len(found["validation"]) == 20


def test_the_split_depends_on_the_path_below_the_root_alone(tmp_path: Path) -> None:
    here = prepare(write_texts(tmp_path / "here"), tmp_path / "cache")
    there = prepare(write_texts(tmp_path / "quite" / "elsewhere"), tmp_path / "cache")
    assert here.folder != there.folder
    assert here.fingerprint == there.fingerprint
    more = split_documents(prepare(write_texts(tmp_path / "more", count=40), tmp_path / "cache"))
    for split, texts in split_documents(here).items():
        assert set(texts) <= set(more[split])


def test_fingerprint_follows_text_tokenizer_and_split(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text")
    first = prepare(config, tmp_path / "cache").fingerprint
    folded = prepare(config.model_copy(update={"tokenizer": "ascii"}), tmp_path / "cache").fingerprint
    other_split = prepare(config.model_copy(update={"validation_share": 0.31}), tmp_path / "cache").fingerprint
    source_files(config)[0].path.write_text("changed")
    changed = prepare(config, tmp_path / "cache").fingerprint
    assert len({first, folded, other_split, changed}) == 4


def test_a_known_fingerprint_that_differs_is_refused_with_both(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text")
    first = prepare(config, tmp_path / "cache").fingerprint
    known = config.model_copy(update={"fingerprint": first})
    assert prepare(known, tmp_path / "cache").fingerprint == first
    (tmp_path / "text" / "new.txt").write_text("one more")
    with pytest.raises(
        ValueError, match=rf"fingerprint [0-9a-f]{{16}}, the configuration says {first}: text, .*changed"
    ):
        prepare(known, tmp_path / "cache")


def test_a_known_vocabulary_that_differs_is_refused(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text").model_copy(update={"vocab_size": 300})
    with pytest.raises(ValueError, match=r"vocab_size 300 is given, but the tokens of the corpus are 0 to 255"):
        prepare(config, tmp_path / "cache")


def test_documents_with_a_nul_byte_and_empty_ones_are_left_out_and_counted(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text")
    clean = prepare(config, tmp_path / "clean")
    (tmp_path / "text" / "binary.txt").write_bytes(b"text\0and more")
    (tmp_path / "text" / "empty.txt").touch()
    corpus = prepare(config, tmp_path / "cache")
    assert corpus.fingerprint == clean.fingerprint
    assert read_index(corpus.folder).left_out_documents == 2


def test_bytes_per_token_counts_separators_as_tokens(tmp_path: Path) -> None:
    corpus = prepare(write_texts(tmp_path / "text"), tmp_path / "cache")
    texts = split_documents(corpus)["validation"]
    text_bytes = sum(map(len, texts))
    assert corpus.bytes_per_token == text_bytes / (text_bytes + len(texts))
    assert corpus.validation_tokens == text_bytes + len(texts)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text")
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=rf"the corpus cache {tmp_path}/file/cache cannot be written .*CRITBATCH_CACHE"
    ):
        prepare(config, tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match=rf"the corpus cache {tmp_path}/file cannot be written"):
        prepare(config, tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's own")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_texts(tmp_path / "text")
    monkeypatch.setattr(harness.corpus, "shard_path", lambda *_: Path("/dev/full"))
    with pytest.raises(ValueError, match=r"cache cannot be written \(No space left on device\); .* with room for"):
        prepare(config, tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


def test_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("CRITBATCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == Path("/home/someone/.cache/critbatch")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert default_cache() == Path("/fast/critbatch")
    monkeypatch.setenv("CRITBATCH_CACHE", "~/mine")
    assert default_cache() == Path("/home/someone/mine")


def test_a_home_that_is_not_known_asks_for_the_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(ValueError, match=r"^CRITBATCH_CACHE: the home folder of ~nobody.* write the path in full$"):
        default_cache()


def test_nothing_is_read_again_while_nothing_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_texts(tmp_path / "text")
    corpus = prepare(config, tmp_path / "cache")
    monkeypatch.setattr(harness.corpus, "documents", None)
    assert prepare(config, tmp_path / "cache") == corpus


def prepare_slowly(config: CorpusConfig, cache: Path, builds: Path, barrier: Barrier) -> None:
    build = harness.corpus._build

    def slow_build(*arguments: object) -> None:
        with builds.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        build(*arguments)  # type: ignore[arg-type]

    harness.corpus._build = slow_build  # type: ignore[assignment]
    barrier.wait()
    corpus = prepare(config, cache)
    (cache.parent / f"{os.getpid()}.done").write_text(corpus.fingerprint)


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text")
    spawn = multiprocessing.get_context("spawn")
    arguments = (config, tmp_path / "cache", tmp_path / "builds", spawn.Barrier(2))
    processes = [spawn.Process(target=prepare_slowly, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((tmp_path / "builds").read_text().split()) == 1
    assert len({path.read_text() for path in tmp_path.glob("*.done")}) == 1


KILLED_WHILE_BUILDING = """
import os, sys
from pathlib import Path
import harness.corpus
from harness.config import CorpusConfig

harness.corpus.write_index = lambda *_: os._exit(9)
config = CorpusConfig.model_validate_json(sys.argv[1])
harness.corpus.prepare(config, Path(sys.argv[2]))
"""


def test_a_process_killed_while_building_leaves_nothing_that_counts(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text")
    command = [sys.executable, "-c", KILLED_WHILE_BUILDING, config.model_dump_json(), str(tmp_path / "cache")]
    assert subprocess.run(command, check=False).returncode == 9
    assert [Path(name).suffix for name in visible(tmp_path / "cache")] == [".partial"]
    corpus = prepare(config, tmp_path / "cache")
    assert visible(tmp_path / "cache") == [corpus.folder.name]


def test_what_a_killed_build_left_is_removed_by_the_next_and_what_is_being_built_is_not(tmp_path: Path) -> None:
    (tmp_path / "cache" / "abandoned.partial").mkdir(parents=True)
    (tmp_path / "cache" / "building.partial").mkdir()
    with (tmp_path / "cache" / "building.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        corpus = prepare(write_texts(tmp_path / "text"), tmp_path / "cache")
    assert visible(tmp_path / "cache") == ["building.partial", corpus.folder.name]


def test_preparing_imports_no_torch() -> None:
    code = "import sys, harness.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run_config(**more: object) -> RunConfig:
    return RunConfig(
        corpus=CorpusConfig(source="text", max_epochs=more.pop("max_epochs", 1.0)),
        model=ModelConfig(width=8, layers=1, heads=1, sequence_length=16),
        optimizer=AdamWConfig(peak_lr=0.01),
        evaluation=EvaluationConfig(tokens=more.pop("evaluation_tokens", 64)),
        global_batch_tokens=64,
        **more,
    )


def corpus_of(train_tokens: int, validation_tokens: int = 1000) -> Corpus:
    return Corpus(Path("nowhere"), "f", 256, train_tokens, validation_tokens, 1.0)


def test_check_budget_allows_one_epoch_and_no_token_more() -> None:
    """1024 tokens are 64 windows of 16, and the last needs one token more for its target."""
    check_budget(corpus_of(1025), run_config(token_budget=1024))
    with pytest.raises(
        ValueError,
        match=r"needs 1024 tokens, 1.02 epochs of the 1008 in the training split; corpus.max_epochs allows 1:",
    ):
        check_budget(corpus_of(1024), run_config(token_budget=1024))


def test_check_budget_counts_whole_steps_and_allows_epochs_by_name() -> None:
    check_budget(corpus_of(1025), run_config(token_budget=1024 + 63))
    check_budget(corpus_of(1025), run_config(token_budget=2560, max_epochs=2.5))
    with pytest.raises(ValueError, match=r"2.56 epochs .* allows 2.5: lower token_budget"):
        check_budget(corpus_of(1025), run_config(token_budget=2624, max_epochs=2.5))


def test_check_budget_refuses_an_evaluation_that_the_validation_split_cannot_give() -> None:
    check_budget(corpus_of(1025, validation_tokens=65), run_config(token_budget=64))
    with pytest.raises(ValueError, match=r"evaluation.tokens 64 is more than the 48 of the validation split"):
        check_budget(corpus_of(1025, validation_tokens=64), run_config(token_budget=64))
    with pytest.raises(ValueError, match=r"evaluation.tokens 40 is not a whole number of sequences of 16 .* 32 and 48"):
        check_budget(corpus_of(1025), run_config(token_budget=64, evaluation_tokens=40))

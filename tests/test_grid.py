import math
from pathlib import Path
from typing import Any

import pytest

from harness.config import CorpusConfig, RunConfig
from harness.corpus import Corpus
from sweeps.grid import expand, on_fresh_seeds
from sweeps.spec import LearningRates, SweepSpec
from sweeps.sweep_file import dump_spec, preset_names, read_spec
from tests.sweep_examples import CORPUS, changed, prepared, write_yaml


def runs_of(**keys: Any) -> list[RunConfig]:
    return expand(SweepSpec.parse(changed(**keys), source="small"), prepared)


def lines_of(**keys: Any) -> list[str]:
    with pytest.raises(ValueError, match=r"\S") as caught:
        runs_of(**keys)
    return str(caught.value).splitlines()


def test_expand_crosses_the_axes_in_the_order_of_the_file() -> None:
    runs = runs_of(grid={"global_batch_tokens": [256, 1024], "seed": [0, 1]})
    assert [(r.optimizer.name, r.global_batch_tokens, r.init_seed) for r in runs] == [
        ("adamw", 256, 0), ("adamw", 256, 1), ("adamw", 1024, 0), ("adamw", 1024, 1),
        ("muon", 256, 0), ("muon", 256, 1), ("muon", 1024, 0), ("muon", 1024, 1),
    ]  # fmt: skip


def test_expand_fills_in_the_corpus() -> None:
    run = runs_of()[0]
    assert (run.corpus.fingerprint, run.corpus.vocab_size, run.model.vocab_size) == (CORPUS.fingerprint, 128, 128)


def test_expand_prepares_each_corpus_once() -> None:
    asked = []

    def prepare(corpus: CorpusConfig) -> Corpus:
        asked.append(corpus.tokenizer)
        return CORPUS

    grid = {"global_batch_tokens": [256], "corpus.tokenizer": ["ascii", "bytes"]}
    runs = expand(SweepSpec.parse(changed(grid=grid), source="small"), prepare)
    assert asked == ["ascii", "bytes"]
    assert len(runs) == 4


def test_expand_gives_each_optimizer_its_own_settings() -> None:
    adamw, muon = runs_of(grid={"global_batch_tokens": [256]})
    assert (adamw.optimizer.peak_lr, adamw.optimizer.name) == (0.01, "adamw")
    assert (muon.optimizer.peak_lr, muon.optimizer.name) == (0.02, "muon")
    assert muon.optimizer.model_dump()["momentum"] == 0.9


def test_expand_reads_seed_as_both_seeds() -> None:
    base = changed()["base"] | {"seed": 3}
    assert {(r.init_seed, r.data_seed) for r in runs_of(base=base)} == {(3, 3)}


def test_expand_refuses_seed_beside_one_of_its_parts() -> None:
    base = changed()["base"] | {"seed": 3, "data_seed": 1}
    assert lines_of(base=base) == ["small: seed sets init_seed and data_seed; remove seed or data_seed"]


def test_axis_of_one_optimizer_leaves_the_others_alone() -> None:
    muon = {"learning_rate": [0.02]}
    runs = runs_of(
        optimizers=changed()["optimizers"] | {"muon": muon},
        grid={"global_batch_tokens": [256], "optimizers.muon.momentum": [0.9, 0.95]},
    )
    assert [(r.optimizer.name, r.optimizer.model_dump().get("momentum")) for r in runs] == [
        ("adamw", None),
        ("muon", 0.9),
        ("muon", 0.95),
    ]


def test_zip_walks_its_lists_together() -> None:
    runs = runs_of(grid={}, zip={"global_batch_tokens": [256, 1024], "schedule.warmup_tokens": [512, 2048]})
    pairs = {(r.global_batch_tokens, r.schedule.warmup_tokens) for r in runs}
    assert pairs == {(256, 512), (1024, 2048)}


def test_zip_refuses_lists_of_unequal_length() -> None:
    (line,) = lines_of(zip={"seed": [0, 1], "schedule.warmup_tokens": [512]})
    assert "equally long" in line
    assert "'seed': 2" in line


def test_where_keeps_what_matches_any_entry() -> None:
    where = [{"optimizer": "muon", "global_batch_tokens": [256, 512]}, {"global_batch_tokens": 1024}]
    runs = runs_of(grid={"global_batch_tokens": [256, 512, 1024]}, where=where)
    assert {(r.optimizer.name, r.global_batch_tokens) for r in runs} == {
        ("muon", 256), ("muon", 512), ("adamw", 1024), ("muon", 1024),
    }  # fmt: skip


def test_where_removes_combinations_before_they_are_checked() -> None:
    runs = runs_of(grid={"global_batch_tokens": [256, 100]}, where=[{"global_batch_tokens": 256}])
    assert {r.global_batch_tokens for r in runs} == {256}


def test_where_refuses_what_is_no_axis_and_what_keeps_nothing() -> None:
    assert lines_of(where=[{"optimiser": "muon"}]) == [
        "small: where, entry 1: 'optimiser' is not an axis of this sweep; did you mean 'optimizer'?"
    ]
    assert "entry 1 keeps no combination" in lines_of(where=[{"optimizer": "moun"}])[0]


def test_same_run_from_two_combinations_is_run_once() -> None:
    runs = runs_of(grid={"global_batch_tokens": [256]}, zip={"seed": [0, 0], "corpus.max_epochs": [1, 2]})
    assert [r.optimizer.name for r in runs] == ["adamw", "muon"]


def test_value_listed_twice_on_an_axis_is_refused() -> None:
    assert lines_of(grid={"seed": [0, 1, 0], "global_batch_tokens": [256]}) == ["small: grid.seed lists 0 twice"]


def test_token_budget_may_depend_on_the_batch() -> None:
    runs = runs_of(token_budget={256: 8192, 1024: 32768})
    assert {(r.global_batch_tokens, r.token_budget) for r in runs} == {(256, 8192), (1024, 32768)}


def test_token_budget_refuses_a_batch_without_an_entry() -> None:
    (line,) = lines_of(token_budget={256: 8192})
    assert line.startswith("small: token_budget has no entry for the batch of 1024 tokens; it has 256 [optimizer=adamw")


def test_learning_rates_scale_with_the_batch_up_to_the_cap() -> None:
    rule = LearningRates(centre=16e-3, at_batch_tokens=1024, cap=32e-3, multiples=(0.5, 1, 2))
    assert {batch: rule.at(batch) for batch in (256, 1024, 4096, 16384)} == {
        256: [0.004, 0.008, 0.016],
        1024: [0.008, 0.016, 0.032],
        4096: [0.016, 0.032, 0.064],
        16384: [0.016, 0.032, 0.064],
    }


def test_learning_rates_have_four_digits_as_in_the_name_of_a_run() -> None:
    (rate,) = LearningRates(centre=16e-3, at_batch_tokens=1024).at(2048)
    assert rate == 0.02263
    assert math.isclose(rate, 16e-3 * math.sqrt(2), rel_tol=1e-3)


def test_learning_rates_refuse_rules_that_are_not_whole() -> None:
    (line,) = lines_of(optimizers={"adamw": {"learning_rate": {"centre": 0.01}}})
    assert "needs at_batch_tokens" in line
    (line,) = lines_of(optimizers={"adamw": {"learning_rate": {"centr": 0.01, "at_batch_tokens": 1}}})[:1]
    assert line == "small: 'centr' is not a key of optimizers.adamw.learning_rate; did you mean 'centre'?"


def test_peak_lr_may_be_an_axis_but_not_beside_a_rule() -> None:
    grid = {"global_batch_tokens": [256], "optimizer.peak_lr": [0.1, 0.2]}
    runs = runs_of(optimizers={"adamw": {}, "muon": {}}, grid=grid)
    assert [r.optimizer.peak_lr for r in runs] == [0.1, 0.2, 0.1, 0.2]
    assert "both a learning_rate and a peak_lr" in lines_of(grid=grid)[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grids": {}}, "small: 'grids' is not a key of the top level; did you mean 'grid'?"),
        ({"confirm": {"seed": [2]}}, "small: 'seed' is not a key of confirm; did you mean 'seeds'?"),
        ({"machine": {"device": 2}}, "small: 'device' is not a key of machine; did you mean 'devices'?"),
        (
            {"grid": {"global_batch_tokens": [256], "schedule.warmup_token": [1]}},
            "small: 'warmup_token' is not a key of schedule; did you mean 'warmup_tokens'?",
        ),
        (
            {"grid": {"global_batch_token": [256]}, "token_budget": 1},
            "small: 'global_batch_token' is not a key of the top level; did you mean 'global_batch_tokens'?",
        ),
        (
            {"optimizers": {"adamw": {"peak_lr": 0.1, "weight_decy": 0.1}}},
            "small: 'weight_decy' is not a key of optimizers.adamw; did you mean 'weight_decay'?",
        ),
        (
            {"optimizers": {"moun": {"peak_lr": 0.1}}},
            "small: unknown optimizer 'moun' under optimizers; did you mean 'muon'?",
        ),
        (
            {"grid": {"optimizer": ["adam"]}},
            "small: grid.optimizer lists 'adam', which has no section under optimizers; did you mean 'adamw'?",
        ),
        (
            {"optimizers": {"adamw": {"lr": 0.1}}},
            "small: 'lr' is not a key of optimizers.adamw; did you mean 'learning_rate'?",
        ),
        ({"baseline": "sgd"}, "small: baseline 'sgd' is none of the sweep's optimizers; one of: adamw, muon"),
        ({"name": "a/b"}, "small: name 'a/b' becomes a folder: use letters, digits, '.', '_' and '-' only"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(keys: dict[str, Any], message: str) -> None:
    assert message in lines_of(**keys)


def test_missing_rate_names_the_key_of_the_sweep_file() -> None:
    (line,) = lines_of(optimizers={"adamw": {"weight_decay": 0.1}})
    assert line.startswith("small: optimizers.adamw.learning_rate is missing; give a list such as [0.01, 0.02]")


def test_missing_section_is_said_once_for_all_combinations() -> None:
    assert lines_of(base={"model": {"preset": "115k"}}) == ["small: corpus is missing"]
    with pytest.raises(ValueError, match=r"^small: targets_nats is missing$"):
        SweepSpec.parse({key: value for key, value in changed().items() if key != "targets_nats"}, source="small")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"token_budget": "64K"},
            "small: token_budget: expected a whole number or a mapping of keys, not '64K'; "
            "for example token_budget: 65536, or for each batch {256: 65536, 1024: 131072}",
        ),
        (
            {"targets_nats": 2.5},
            "small: targets_nats: expected a list, not 2.5; for example targets_nats: [2.2, 2.0]",
        ),
        ({"targets_nats": [-1]}, "small: targets_nats.0: expected a number above 0, not -1"),
        (
            {"where": "muon only"},
            "small: where: expected a list, not 'muon only'; "
            "for example where: [{optimizer: muon, global_batch_tokens: [1024, 4096]}]",
        ),
        (
            {"optimizers": {"adamw": {"learning_rate": "high"}}},
            "small: optimizers.adamw.learning_rate: expected a mapping of keys, not 'high'; "
            "for example learning_rate: [0.01, 0.02]",
        ),
        (
            {"base": changed()["base"] | {"precision": ["fp32", "bf16"]}},
            "small: precision: expected 'fp32' or 'bf16', not ['fp32', 'bf16']; "
            "one value belongs here; to sweep it, put precision under grid",
        ),
        (
            {"optimizers": {"adamw": {"learning_rate": 0.1, "weight_decay": [0, 0.1]}}},
            "small: optimizer.weight_decay: expected a number, not [0, 0.1]; "
            "one value belongs here; to sweep it, put optimizer.weight_decay under grid",
        ),
        ({"grid": {"global_batch_tokens": [256], "seed": [True]}}, "small: init_seed cannot be true"),
    ],
)
def test_value_of_another_form_is_one_line_with_the_form_expected(keys: dict[str, Any], line: str) -> None:
    assert lines_of(**keys)[0] == line
    assert len([other for other in lines_of(**keys) if "data_seed" not in other]) == 1


def test_batch_that_is_no_whole_number_of_sequences_is_refused_with_the_nearest() -> None:
    (line,) = lines_of(grid={"global_batch_tokens": [256, 100]})
    assert "global_batch_tokens 100 is not a whole number of sequences of 64 tokens (1.5625)" in line
    assert "the nearest are 64 and 128" in line
    assert line.endswith("[optimizer=adamw, global_batch_tokens=100 and 1 more]")


def test_budget_smaller_than_a_batch_is_refused() -> None:
    base = changed()["base"] | {"schedule": {}}
    (line,) = lines_of(base=base, token_budget=512)
    assert line.startswith("small: token_budget 512 is smaller than one global batch of 1024 tokens")


def test_warmup_longer_than_the_run_is_refused() -> None:
    lines = lines_of(base=changed()["base"] | {"schedule": {"warmup_tokens": 20000}})
    assert lines[0].startswith("small: warmup of 20224 tokens (79 steps of 256) is more than 50% of the run's 16384")


def test_all_mistakes_are_listed_at_once() -> None:
    lines = lines_of(grid={"global_batch_tokens": [100, 32768]})
    assert len(lines) == 2
    assert "100 is not a whole number" in lines[0]
    assert "token_budget 16384 is smaller than one global batch of 32768" in lines[1]


def test_mistake_of_every_run_is_said_once_and_names_none() -> None:
    assert lines_of(base=changed()["base"] | {"precison": "fp32"}) == [
        "small: 'precison' is not a key of the top level; did you mean 'precision'?"
    ]


def test_stop_before_the_last_target_is_refused() -> None:
    (line,) = lines_of(base=changed()["base"] | {"stop_at_loss_nats": 2.6})
    assert line == "small: runs stop at 2.6 nats, before the target of 2.5; lower stop_at_loss_nats"


def test_confirm_refuses_seeds_of_the_grid() -> None:
    (line,) = lines_of(confirm={"seeds": [0, 2]})
    assert "confirm.seeds [0] are seeds of the grid already" in line


def test_fresh_seeds_merge_the_seeds_of_the_grid() -> None:
    runs = runs_of(grid={"global_batch_tokens": [256], "seed": [0, 1]})
    fresh = on_fresh_seeds(runs, [2, 3])
    assert [(r.optimizer.name, r.init_seed, r.data_seed) for r in fresh] == [
        ("adamw", 2, 2), ("adamw", 3, 3), ("muon", 2, 2), ("muon", 3, 3),
    ]  # fmt: skip


def test_extends_merges_mappings_replaces_lists_and_null_takes_away(tmp_path: Path) -> None:
    write_yaml(tmp_path, changed(confirm={"seeds": [2]}, description="parent"), "parent.yaml")
    child = {"extends": "parent.yaml", "base": {"schedule": {"warmup_min_steps": 2}}, "confirm": None,
             "grid": {"global_batch_tokens": [4096]}}  # fmt: skip
    spec = read_spec(write_yaml(tmp_path, child, "child.yaml"))
    assert spec.base["schedule"] == {"warmup_tokens": 1024, "warmup_min_steps": 2}
    assert (spec.grid, spec.confirm) == ({"global_batch_tokens": [4096]}, None)
    assert (spec.name, spec.description) == ("child", "")


def test_extends_refuses_a_circle(tmp_path: Path) -> None:
    write_yaml(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    path = write_yaml(tmp_path, {"extends": "a.yaml"}, "b.yaml")
    with pytest.raises(ValueError, match=r"extends itself through b\.yaml → a\.yaml → b\.yaml"):
        read_spec(path)


def test_resolved_sweep_reads_back_to_itself(tmp_path: Path) -> None:
    for name in preset_names():
        spec = read_spec(name)
        path = tmp_path / "resolved.yaml"
        path.write_text(dump_spec(spec))
        assert read_spec(str(path)) == spec


def test_set_changes_a_key_of_the_sweep() -> None:
    settings = ["confirm.top=2", "token_budget.256=1e6", "grid.schedule.warmup_min_steps=[1, 4]"]
    spec = read_spec("quickstart", settings)
    assert spec.confirm is not None
    assert spec.confirm.top == 2
    assert isinstance(spec.token_budget, dict)
    assert spec.token_budget[256] == 1_000_000
    assert spec.grid["schedule.warmup_min_steps"] == [1, 4]


def test_set_fixes_a_key_of_the_runs_and_takes_it_off_the_axes() -> None:
    settings = ["global_batch_tokens=1024", "seed=7", "optimizer.peak_lr=0.03", "optimizer=muon"]
    spec = read_spec("quickstart", settings)
    (run,) = expand(spec, prepared)
    assert (run.optimizer.name, run.global_batch_tokens, run.init_seed) == ("muon", 1024, 7)
    assert run.optimizer.peak_lr == 0.03


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", "--set seed: expected key=value"),
        ("sed=1", "--set sed=1: 'sed' is a key of neither the sweep nor a run; did you mean 'seed'?"),
        ("name.x=1", "--set name.x: name is 'quickstart', which has no keys"),
        ("grid.seed=[0", "--set grid.seed=[0, line 1, column 3: expected ',' or ']'"),
        ("optimizer.momentun=0.9", "'momentun' is not a key of optimizers.muon; did you mean 'momentum'?"),
    ],
)
def test_set_is_checked_like_the_file(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"set|key") as caught:
        expand(read_spec("quickstart", [setting]), prepared)
    assert message in str(caught.value)


def test_sweep_file_reads_exponents_as_numbers_and_refuses_a_key_given_twice(tmp_path: Path) -> None:
    assert read_spec("quickstart").optimizers["adamw"].learning_rate == LearningRates(
        centre=0.008, at_batch_tokens=1024, cap=0.012, multiples=(0.5, 1, 2)
    )
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nbase: {}\nname: b\n")
    with pytest.raises(ValueError, match=r"twice\.yaml, line 3, column 1: the key 'name' is given twice"):
        read_spec(str(path))


def test_empty_optimizer_is_refused_where_there_is_nothing_to_take_away(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, changed(optimizers={"adamw": None, "muon": {"learning_rate": 0.1}}))
    with pytest.raises(ValueError, match=r"small\.yaml: optimizers\.adamw is empty; give it a learning_rate"):
        read_spec(path)
    child = {"extends": "quickstart", "optimizers": {"muon": None}}
    assert list(read_spec(write_yaml(tmp_path, child, "child.yaml")).optimizers) == ["adamw"]


@pytest.mark.parametrize("glob", ["*.txt", "**/*.txt", "*txt"])
def test_glob_without_quotes_is_explained(tmp_path: Path, glob: str) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text(f"base:\n  corpus:\n    paths: [{glob}]\n")
    with pytest.raises(ValueError, match=r"bare\.yaml, line 3, column \d+: .*; put a glob in quotes, as in '\*\.txt'$"):
        read_spec(str(path))


def test_paths_count_from_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parents").mkdir()
    (tmp_path / "elsewhere").mkdir()
    corpus = {"source": "text", "paths": ["texts/*.txt", "/data/a.txt", "~/b.txt"]}
    write_yaml(tmp_path / "parents", changed(base={"corpus": corpus}), "parent.yaml")
    keys = {"extends": "parents/parent.yaml", "base": {"corpus": {"tokenizer_path": "own.json"}}}
    axis = {"grid": {"corpus.paths": [["one.txt"], ["two.txt"]]}}
    child = write_yaml(tmp_path, keys | axis, "child.yaml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = read_spec("../child.yaml", ["zip.corpus.tokenizer_path=[here.json]"])
    assert spec.base["corpus"] == corpus | {
        "paths": [f"{tmp_path}/parents/texts/*.txt", "/data/a.txt", "~/b.txt"],
        "tokenizer_path": f"{tmp_path}/own.json",
    }
    assert spec.grid["corpus.paths"] == [[f"{tmp_path}/one.txt"], [f"{tmp_path}/two.txt"]]
    assert spec.zip == {"corpus.tokenizer_path": [f"{tmp_path}/elsewhere/here.json"]}
    assert read_spec(child).base["corpus"]["tokenizer_path"] == f"{tmp_path}/own.json"


def test_name_of_a_data_set_is_no_path(tmp_path: Path) -> None:
    corpus = {"source": "huggingface", "paths": ["owner/texts"], "tokenizer_path": "own.json"}
    write_yaml(tmp_path, changed(base={"corpus": corpus}), "parent.yaml")
    child = {"extends": "parent.yaml", "base": {"corpus": {"paths": ["owner/others", "en"]}}}
    spec = read_spec(write_yaml(tmp_path, child, "child.yaml"))
    assert spec.base["corpus"] == corpus | {
        "paths": ["owner/others", "en"], "tokenizer_path": f"{tmp_path}/own.json",
    }  # fmt: skip


def test_unknown_sweep_is_refused_with_the_nearest_preset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sweep 'quikstart'.* did you mean 'quickstart'"):
        read_spec("quikstart")
    with pytest.raises(ValueError, match=r"no sweep .*nosuch\.yaml"):
        read_spec(str(tmp_path / "nosuch.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"list\.yaml: expected a mapping .* found list"):
        read_spec(str(tmp_path / "list.yaml"))


def test_batch_written_as_a_decimal_number_gets_its_own_rate_and_budget() -> None:
    rule = {"centre": 0.01, "at_batch_tokens": 1024}
    (run,) = runs_of(
        optimizers={"adamw": {"learning_rate": rule}},
        grid={"global_batch_tokens": [4096.0]},
        token_budget={4096: 65536},
    )
    assert (run.global_batch_tokens, run.optimizer.peak_lr, run.token_budget) == (4096, 0.02, 65536)

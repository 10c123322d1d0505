"""The verbs that read: their JSON is the contract that others build on."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from analysis.contract import json_schema
from sweeps.cli import main
from tests.synthetic import Laboratory, write_runs

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results" / "reference" / "zhang2024" / "steps_to_target.csv"
IN_SEQUENCES = ["--rename", "batch_size=global_batch_tokens", "--batch-in", "sequences", "--sequence-length", "512"]

#: Keys that hold within schema_version 1; rows may have more.
FROZEN: dict[str, dict[str, set[str]]] = {
    "fit": {
        "tokens_to_target": {
            "model", "optimizer", "global_batch_tokens", "target_loss_nats", "protocol", "tokens_to_target", "interval",
            "n", "n_censored", "status",
        },
        "critical_batch": {
            "model", "optimizer", "target_loss_nats", "protocol", "definition", "critical_batch_tokens", "interval",
            "level", "verdict", "reasons", "residuals", "parameters", "parameter_intervals",
        },
        "token_ratio": {
            "model", "baseline", "challenger", "global_batch_tokens", "target_loss_nats", "protocol", "ratio",
            "interval", "level", "verdict", "reasons",
        },
        "laws": {"of", "definition", "by", "exponents", "prefactor", "intervals", "verdict"},
        "refused": {"what", "reason"},
    },
    "compare": {
        "final_loss": {
            "model", "optimizer", "global_batch_tokens", "token_budget", "final_loss_nats", "interval", "n",
        },
        "gap": {
            "model", "baseline", "challenger", "global_batch_tokens", "token_budget", "gap_nats", "interval", "p_value",
        },
        "iso_loss_batch": {
            "model", "baseline", "challenger", "global_batch_tokens", "batch_ratio", "lower_bound", "verdict",
        },
        "speedup": {"model", "baseline", "challenger", "token_budget", "token_ratio", "interval", "verdict"},
        "refused": {"what", "reason"},
    },
    "frontier": {
        "points": {
            "model", "optimizer", "target_loss_nats", "protocol", "kind", "device", "global_batch_tokens",
            "num_devices", "train_seconds", "interval", "device_seconds", "train_flops", "on_frontier",
            "on_flops_frontier", "verdict", "reasons",
        },
        "dominance": {
            "model", "baseline", "challenger", "target_loss_nats", "kind", "cost", "share", "interval", "cost_ratio",
            "verdict",
        },
        "choices": {"model", "target_loss_nats", "kind", "question", "limit", "optimizer", "train_seconds"},
        "cost_model": {"name", "value", "unit", "source"},
        "refused": {"what", "reason"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laboratory")
    write_runs(Laboratory(), folder)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def published(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    return answer(capsys, "fit", str(PUBLISHED), *IN_SEQUENCES, *words)


@pytest.mark.parametrize("verb", FROZEN)
def test_answer_keeps_the_keys_of_its_version(verb: str) -> None:
    schema = json_schema()[verb]
    assert schema["properties"]["schema_version"]["const"] == 1
    for name, keys in FROZEN[verb].items():
        row = schema["$defs"][schema["properties"][name]["items"]["$ref"].rpartition("/")[2]]
        assert keys <= set(row["required"]), name


@pytest.mark.parametrize("verb", FROZEN)
def test_answer_fits_the_schema_that_the_command_prints(
    sweep: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert main(["schema"]) == 0
    schemas = json.loads(capsys.readouterr().out)
    found = answer(capsys, verb, str(sweep))
    jsonschema.validate(found, schemas[verb])
    assert all(
        found[name]
        for name in FROZEN[verb]
        if name not in ("refused", "iso_loss_batch", "gap", "final_loss", "speedup", "laws")
    )


@pytest.mark.parametrize("verb", FROZEN)
def test_verb_prints_tables_for_people(sweep: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main([verb, str(sweep)]) == 0
    assert "Muon" in capsys.readouterr().out


def test_fit_gives_the_published_critical_batches_and_their_law(capsys: pytest.CaptureFixture[str]) -> None:
    found = published(capsys, "--reference-batch-tokens", str(256 * 512), "--definition", "overhead_20pct")
    in_sequences = {row["model"]: row["critical_batch_tokens"] / 512 for row in found["critical_batch"]}
    expected = {"85M": 745.320, "151M": 955.158, "302M": 1393.727, "604M": 1888.522, "1.2B": 2533.411}
    assert in_sequences == pytest.approx(expected, rel=1e-4)
    (law,) = [law for law in found["laws"] if law["by"] == ["num_params_nonembedding"]]
    exponent = law["exponents"]["num_params_nonembedding"]
    assert exponent == pytest.approx(0.46828, abs=5e-4)
    assert law["prefactor"] * 1e6**exponent / 512 == pytest.approx(93.197, rel=1e-4)  # sequences, N in millions
    low, high = law["intervals"]["num_params_nonembedding"]
    assert low < exponent < high
    assert all(row["interval"][0] < row["critical_batch_tokens"] for row in found["critical_batch"])


def test_overhead_20pct_of_an_outside_table_needs_a_reference_batch(capsys: pytest.CaptureFixture[str]) -> None:
    found = published(capsys)
    assert "overhead_20pct" not in {row["definition"] for row in found["critical_batch"]}
    (refusal,) = [row for row in found["refused"] if row["what"] == "critical_batch overhead_20pct"]
    assert "reference batch" in refusal["reason"]


def test_one_optimizer_alone_gives_no_ratio_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = published(capsys)
    assert found["token_ratio"] == []
    assert {"what": "token_ratio", "reason": "adamw is the only optimizer: there is nothing to compare with"} in found[
        "refused"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "nowhere.csv"], "nowhere.csv: no such file or folder"),
        (["fit", str(PUBLISHED)], "global_batch_tokens"),
        (["fit", str(PUBLISHED), "--rename", "batch_size"], "--rename batch_size: expected THEIRS=OURS"),
        (["fit", str(PUBLISHED), *IN_SEQUENCES[:4]], "--sequence-length"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [["fit", "--json"], ["fit"], ["compare"], ["frontier"]])
def test_answers_are_made_by_one_thread_of_linear_algebra(words: list[str]) -> None:
    """On small matrices threads wait for each other: twice the time, in three times the work."""
    code = f"""
        import os, sys
        class Guard:
            def find_spec(self, name, path=None, target=None):
                if name == "numpy":
                    print(os.environ.get("OPENBLAS_NUM_THREADS"), file=sys.stderr)
        sys.meta_path.insert(0, Guard())
        from sweeps.cli import main
        main({[words[0], str(PUBLISHED), *IN_SEQUENCES, *words[1:]]!r})
        """
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env=environment
    )
    assert set(ran.stderr.split()) == {"1"}


def test_fit_of_a_small_table_imports_neither_torch_nor_what_draws_nor_what_is_slow() -> None:
    heavy = {"torch", "lightning", "seaborn", "matplotlib", "pandas", "rich"}
    heavy |= {"scipy.optimize", "scipy.linalg", "scipy.stats"}
    code = f"import sys; from sweeps.cli import main; main({['fit', str(PUBLISHED), *IN_SEQUENCES, '--json']!r}); "
    code += f"print({heavy} & set(sys.modules), file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip().splitlines()[-1] == "set()"

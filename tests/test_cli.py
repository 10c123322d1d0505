import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import sweeps.launch
from harness.record import write_json
from sweeps.cli import main
from sweeps.status import RunStatus, runs_table
from sweeps.store import State, SweepFolder, claim, read_run, record_failure
from sweeps.sweep_file import PRESETS
from tests.fake_training import finish
from tests.sweep_examples import changed, started, write_yaml


def text_sweep(folder: Path, text: Path, **keys: Any) -> str:
    """Write a sweep over a text file, which is prepared in no time."""
    corpus = {"source": "text", "paths": [str(text)], "tokenizer": "bytes", "validation_share": 0.2}
    base = changed()["base"] | {"corpus": corpus, "evaluation": {"tokens": 256}}
    return write_yaml(folder, changed(base=base) | {"machine": {"accelerator": "cpu"}} | keys)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of text files, enough for 16,384 tokens; corpus cache and working folder are temporary."""
    monkeypatch.setenv("CRITBATCH_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(64):
        (corpus / f"{number}.txt").write_text(f"It was a dark and stormy night, the {number}th of its kind. " * 20)
    return corpus / "*.txt"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def heavy_modules_after(*verb: str) -> list[str]:
    """Return which heavy libraries a verb has imported."""
    code = (
        "import sys, contextlib, os\nfrom sweeps.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, 'w')): main(sys.argv[1:])\n"
        "heavy = {'torch', 'lightning', 'polars', 'scipy', 'seaborn', 'submitit', 'pydantic'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = run("-c", code, *verb)
    assert done.returncode == 0, done.stderr
    loaded: list[str] = json.loads(done.stdout.replace("'", '"'))
    return loaded


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    assert heavy_modules_after("--help") == []
    began = time.perf_counter()
    assert run("-m", "sweeps.cli", "--help").returncode == 0
    assert time.perf_counter() - began < 2.0  # 0.3 s on an idle machine; the benchmark holds it to that


def test_status_imports_neither_torch_nor_the_analysis(tmp_path: Path) -> None:
    folder = started(tmp_path / "small")
    assert heavy_modules_after("status", str(folder.path), "--runs") == ["pydantic"]


def test_presets_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    listed = out.partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == sorted(path.stem for path in PRESETS.glob("*.yaml"))


def test_plan_prints_cells_and_writes_no_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = text_sweep(tmp_path, text)
    assert main(["plan", sweep, "--json", "--slots", "2", "--flops-per-second", "1e9"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["runs"], plan["slots"], len(plan["cells"])) == (4, 2, 4)
    assert plan["hours"] == pytest.approx(plan["flops"] / 1e9 / 3600 / 2)
    assert main(["plan", sweep]) == 0
    assert "small: 4 runs" in capsys.readouterr().out
    assert list(Path.cwd().iterdir()) == []


def test_plan_measures_its_speed_on_finished_runs(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = text_sweep(tmp_path, text)
    assert main(["plan", sweep, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hours"] is None
    spec_folder = _written(sweep)
    first = spec_folder.run(spec_folder.read_manifest().runs[0].run_id)
    finish(read_run(first), first)
    assert main(["plan", sweep, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["flops_per_second"] == 16384 * 1e6 / 2.0
    assert plan["flops_per_second_source"] == "measured on 1 finished run of this sweep"


def _written(sweep: str) -> SweepFolder:
    """Write the folder of a sweep as `run` does, without training."""
    from sweeps.plan import prepare_runs
    from sweeps.store import write_sweep
    from sweeps.sweep_file import read_spec

    spec = read_spec(sweep)
    folder = SweepFolder(Path("results") / spec.name)
    write_sweep(spec, prepare_runs(spec)[0], folder)
    return folder


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gird": {}}, "'gird' is not a key of the top level; did you mean 'grid'?"),
        ({"optimizers": {"moun": {"learning_rate": 0.1}}}, "unknown optimizer 'moun'"),
        ({"grid": {"global_batch_tokens": [100]}}, "is not a whole number of sequences of 64 tokens"),
        (
            {"grid": {"global_batch_tokens": [192]}, "machine": {"devices": 2}},
            "global batch of 3 sequences (192 tokens) does not divide over 2 devices",
        ),
        ({"token_budget": {256: 192, 1024: 4096}}, "token_budget 192 is smaller than one global batch of 256 tokens"),
        ({"token_budget": 1024}, "warmup of 1024 tokens (4 steps of 256) is more than 50% of the run's 1024"),
        ({"token_budget": 1_638_400}, "the run needs 1638400 tokens"),
        ({"base": {"corpus": {"source": "text", "paths": ["nosuch/*.txt"]}, "model": {"preset": "115k"}}}, "nosuch"),
    ],
)  # fmt: skip
def test_bad_sweep_is_refused_before_anything_is_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, keys: dict[str, Any], message: str
) -> None:
    assert main([verb, text_sweep(tmp_path, text, **keys)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("critbatch: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert list(Path.cwd().iterdir()) == []


def test_unknown_sweep_and_unwritable_results_are_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "quikstart"]) == 2
    assert capsys.readouterr().err == (
        "critbatch: no sweep 'quikstart': neither a file, a folder with a sweep.yaml, nor a preset; "
        "did you mean 'quickstart'?\n"
    )
    (tmp_path / "file").write_text("in the way")
    assert main(["run", text_sweep(tmp_path, text), "--results", str(tmp_path / "file")]) == 2
    assert "cannot be written (Not a directory); choose another with --results" in capsys.readouterr().err


def test_set_is_taken_by_every_verb_that_reads_a_sweep(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = text_sweep(tmp_path, text)
    assert main(["plan", sweep, "--json", "--set", "global_batch_tokens=512", "--set", "name=other"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["sweep"], {cell["global_batch_tokens"] for cell in plan["cells"]}) == ("other", {512})
    folder = str(_written(sweep).path)
    for verb, given in (("plan", sweep), ("run", sweep), ("report", sweep), ("report", folder)):
        assert main([verb, given, "--set", "nonsense=1"]) == 2
        assert "'nonsense' is a key of neither the sweep nor a run" in capsys.readouterr().err


def test_status_reads_no_sweep_file_and_takes_no_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["status", "--set", "seed=1"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --set" in capsys.readouterr().err


def test_run_trains_and_writes_the_report(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[tuple[Path, Path]] = []

    def report(folder: SweepFolder, reference: Path) -> Path:
        reported.append((folder.path, reference))
        return folder.path / "report.html"

    monkeypatch.setattr(sweeps.launch, "report", report)
    monkeypatch.setattr(sweeps.launch.run_folder, "__defaults__", (0, "tests.fake_training:train"))
    assert main(["run", text_sweep(tmp_path, text), "--slots", "1"]) == 0
    assert reported == [(Path("results/small"), Path("results/reference/small"))]
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "small: 4 runs on 1 slot, in results/small"
    assert out.splitlines()[-1] == "results/small/report.html"
    assert main(["status"]) == 0
    assert "4 of 4 done" in capsys.readouterr().out


def test_run_says_what_another_form_of_the_sweep_changes_in_the_folder(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps.launch, "report", lambda folder, _: folder.path / "report.html")
    monkeypatch.setattr(sweeps.launch.run_folder, "__defaults__", (0, "tests.fake_training:train"))
    sweep = text_sweep(tmp_path, text)
    said = []
    for settings in ([], [], ["--set", "grid.global_batch_tokens=[256]", "--set", "confirm={seeds: [5, 6]}"]):
        monkeypatch.setattr(sweeps.launch, "choose_confirmations", lambda *_: None)
        assert main(["run", sweep, "--slots", "1", *settings]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("finished")][:-1])
    assert said == [
        ["small: 4 runs on 1 slot, in results/small"],
        ["small: 4 runs on 1 slot, in results/small"],
        [
            "small: 2 runs, then 4 confirmations on 1 slot, in results/small",
            "The folder held another form of this sweep: it differed in grid.global_batch_tokens, confirm.seeds.",
            "2 finished runs left the sweep; their folders stay.",
        ],
    ]


def test_run_says_that_another_one_is_at_work_on_the_sweep(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps.launch, "report", lambda folder, _: folder.path / "report.html")
    monkeypatch.setattr(sweeps.launch, "run_folder", lambda _folder, _slots: None)
    sweep = text_sweep(tmp_path, text)
    folder = _written(sweep)
    others = "Another critbatch is running this sweep; its runs are shared, and times measured now are slower.\n"
    with claim(folder.run(folder.read_manifest().runs[0].run_id)):
        assert main(["run", sweep]) == 0
    assert capsys.readouterr().out.count(others) == 1
    assert main(["run", sweep]) == 0
    assert others not in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["run"], ["submit", "--cluster", "local"]])
def test_gpu_that_is_not_there_is_refused_in_one_line_but_may_be_planned_for(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sweep = text_sweep(tmp_path, text, machine={"accelerator": "gpu"})
    assert main([*verb, sweep]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "machine.accelerator is gpu and a run takes 1 GPU, but there are 0 here" in line
    assert main(["plan", sweep]) == 0


def test_sweep_of_the_results_folder_is_suggested_by_its_path(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _written(text_sweep(tmp_path, text))
    assert main(["run", "small"]) == 2
    assert capsys.readouterr().err == "critbatch: no sweep 'small' here; did you mean 'results/small'?\n"


def test_results_folder_holds_absolute_paths_of_the_corpus(text: Path, tmp_path: Path) -> None:
    written = _written(text_sweep(tmp_path, Path("corpus/*.txt")))
    assert written.read_spec().base["corpus"]["paths"] == [str(text)]
    assert f"- {text}\n" in written.spec.read_text()


def test_reader_that_leaves_early_gets_no_traceback(tmp_path: Path) -> None:
    folder = started(tmp_path / "small")
    command = [sys.executable, "-m", "sweeps.cli", "status", str(folder.path), "--json"]
    status = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert status.stdout is not None
    status.stdout.close()
    assert status.stderr is not None
    assert status.stderr.read() == ""
    assert status.wait() == 1


@pytest.mark.parametrize("speed", ["-1", "0", "nan", "inf", "fast"])
def test_speed_must_be_a_number_above_zero(capsys: pytest.CaptureFixture[str], speed: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "quickstart", f"--flops-per-second={speed}"])
    assert caught.value.code == 2
    assert "expected a number above zero" in capsys.readouterr().err


def test_report_is_not_replaced_by_one_without_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = started(tmp_path / "small")
    (folder.path / "report.html").write_text("of an earlier form")
    (folder.path / "runs.parquet").touch()
    assert main(["report", str(folder.path)]) == 2
    assert "no run has finished yet; there is nothing to report; the report there" in capsys.readouterr().err
    assert (folder.path / "report.html").read_text() == "of an earlier form"


def test_run_says_what_failed_and_how_to_go_on(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: SweepFolder, _slots: int) -> None:
        record_failure(folder.run(folder.read_manifest().runs[0].run_id), "out of luck")

    def interrupt(_folder: SweepFolder, _slots: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps.launch, "report", lambda folder, _: folder.path / "report.html")
    monkeypatch.setattr(sweeps.launch, "run_folder", fail)
    sweep = text_sweep(tmp_path, text)
    assert main(["run", sweep]) == 1
    assert "failed: out of luck (log: results/small/runs/115k-adamw-b256" in capsys.readouterr().err
    monkeypatch.setattr(sweeps.launch, "run_folder", interrupt)
    assert main(["run", sweep, "--set", "seed=1"]) == 130
    assert f"To go on: critbatch run {sweep} --results results --set seed=1" in capsys.readouterr().out


def test_report_without_a_result_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = started(tmp_path / "small")
    assert main(["report", str(folder.path)]) == 2
    assert "no run has finished yet; there is nothing to report" in capsys.readouterr().err


def test_status_counts_cells_and_lists_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = started(tmp_path / "results" / "small")
    finished, running, failed, planned = (folder.run(run.run_id) for run in folder.read_manifest().runs)
    finish(read_run(finished), finished, loss=2.25)
    record_failure(failed, "out of luck")
    progress = {"step": 8, "tokens_seen": 8192, "tokens_per_second": 4096.0, "updated_at": 0.0}
    write_json(running.progress, progress)
    with claim(running):
        assert main(["status", "small", "--results", str(tmp_path / "results"), "--json"]) == 0
        (status,) = json.loads(capsys.readouterr().out)
        assert main(["status", "--results", str(tmp_path / "results"), "--runs"]) == 0
        tables = capsys.readouterr().out
    assert {state: count for state, count in status["counts"].items() if count} == {
        "finished": 1, "running": 1, "failed": 1, "planned": 1,
    }  # fmt: skip
    rows = {row["run_id"]: row for row in status["runs"]}
    assert rows[running.path.name]["seconds_left"] == 2.0
    assert rows[finished.path.name]["loss_nats"] == 2.25
    assert rows[planned.path.name]["loss_nats"] is None
    assert rows[failed.path.name]["reason"] == "out of luck"
    assert "small: 1 of 4 done, 1 running, 1 planned, 1 failed" in tables
    assert "8,192 of 16,384" in tables
    assert "failed: out of luck" in tables


@pytest.mark.parametrize("node", [None, "n1", "gpu-a100-long-name-017"])
def test_tables_of_runs_fit_80_columns_with_every_word_whole(node: str | None) -> None:
    run = RunStatus(
        "adamw-1", "grid", State.INTERRUPTED, "adamw", 16384, 0.0225, 0, 10, 2097152, 1048576, 2.123, 1234567.0, 4000.0,
        None, node=node, job=node and "7_1",
    )  # fmt: skip
    console = Console(width=80)
    with console.capture() as capture:
        console.print(runs_table([run]))
    words = capture.get().split()
    for word in ("adamw", "16,384", "0.0225", "0.10", "interrupted", "1,048,576", "2,097,152", "1,234,567", "(at"):
        assert word in words
    assert (node is None) or f"on{node}" in "".join(line[29:40] for line in capture.get().splitlines()).replace(" ", "")


def test_status_reads_files_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = started(tmp_path / "small")
    first = folder.run(folder.read_manifest().runs[0].run_id)
    done = []
    for _ in range(2):
        assert main(["status", str(folder.path), "--json"]) == 0
        (status,) = json.loads(capsys.readouterr().out)
        done.append(status["counts"]["finished"])
        finish(read_run(first), first)
    assert done == [0, 1]


def test_status_survives_a_corrupt_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = started(tmp_path / "small")
    broken, torn, *_ = (folder.run(run.run_id) for run in folder.read_manifest().runs)
    finish(read_run(broken), broken)
    broken.evaluations.write_text("no row\n")
    torn.run.write_text("{")
    assert main(["status", str(folder.path)]) == 0
    out = capsys.readouterr().out.replace("\n", "")
    assert "evaluations.jsonl, line 1: not a JSON row" in out
    assert "run.json: not a whole JSON file" in out


def test_status_without_a_sweep_says_how_to_start_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "No sweep in results. To start one: critbatch run quickstart\n"
    assert main(["status", "quickstart"]) == 2
    assert "no sweep has been started in this folder" in capsys.readouterr().err


def test_slots_must_be_a_number_above_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "quickstart", "--slots", "0"])
    assert caught.value.code == 2
    assert "expected a whole number above zero, not '0'" in capsys.readouterr().err


def test_preset_is_not_mistaken_for_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "sweep.yaml").write_text("name: another\n")
    assert main(["plan", "smoke"]) == 0
    assert capsys.readouterr().out.startswith("smoke: 16 runs")
    assert main(["plan", "./smoke"]) == 2

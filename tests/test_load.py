"""What a command may be given to read: one sweep, several, tables; and what does not go together."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal

from analysis.inputs.load import read
from analysis.inputs.records import load
from analysis.inputs.tables import TableOptions
from analysis.quantities.targets import targets
from harness.record import EVALUATION_COLUMNS, read_json, write_json
from tests.synthetic import Laboratory, Run, plan, records, write_runs

LAB = Laboratory(noise=0.0, batches=(1024, 4096))


def sweep_in(folder: Path, lab: Laboratory, runs: list[Run] | None = None) -> Path:
    folder.mkdir()
    write_runs(lab, folder, runs)
    return folder


def test_export_of_weights_and_biases_reads_through_names_and_units(tmp_path: Path) -> None:
    """Two runs of 8 sequences of 32 tokens, evaluated every 10 steps of the 5 that are logged."""
    rows = [
        '"Name","optimizer","batch_size","weight_decay","Step","train/lr","train/loss","val/loss","_runtime","_timestamp","Tags"'
    ]
    for run, optimizer, final in (("wise-sun-1", "adamw", 2.0), ("calm-sea-2", "muon", 1.0)):
        for step in range(0, 45, 5):
            evaluated = f"{6.0 - (6.0 - final) * step / 40:.6f}" if step % 10 == 0 else ""
            runtime = step * 0.31
            rows.append(
                f'"{run}","{optimizer}","8","0.1","{step}","{0.01 * min(1, step / 10)}","{6 - step / 40}",'
                f'"{evaluated}","{runtime}","{1.7e9 + runtime}","{"base" if optimizer == "adamw" else ""}"'
            )
    (tmp_path / "wandb_export.csv").write_text("\n".join(rows) + "\n")
    options = TableOptions(
        sequence_length=32,
        batch_in="sequences",
        tokens_in="steps",
        loss_in="bits",
        renames={
            "Name": "run_id",
            "batch_size": "global_batch_tokens",
            "Step": "tokens_seen",
            "val/loss": "val_loss_nats",
            "_runtime": "train_seconds",
        },
    )
    made = read([tmp_path / "wandb_export.csv"], options)
    assert made.runs.select("run_id", "optimizer", "global_batch_tokens", "tuning").rows() == [
        ("calm-sea-2", "muon", 256, ""),
        ("wise-sun-1", "adamw", 256, ""),
    ]
    assert made.runs["sequence_length"].to_list() == [32, 32]
    assert made.runs["train_seconds"].to_list() == pytest.approx([40 * 0.31] * 2)
    assert made.evaluations["tokens_seen"].to_list() == [0, 2560, 5120, 7680, 10240] * 2
    assert made.evaluations["step"].to_list() == [0, 10, 20, 30, 40] * 2
    losses = made.evaluations.filter(run_id="wise-sun-1")["val_loss_nats"].to_list()
    assert losses == pytest.approx([bits * math.log(2) for bits in (6, 5, 4, 3, 2)])
    assert "Tags, _timestamp, train/loss, train/lr" in made.notes[0]
    assert targets(made).filter(optimizer="adamw")["status"].to_list() == ["reached"] * 2


def test_read_refuses_what_is_not_there_and_what_does_not_go_together(tmp_path: Path) -> None:
    sweep, table = sweep_in(tmp_path / "sweep", LAB), tmp_path / "table.csv"
    table.write_text("optimizer,global_batch_tokens,token_budget,final_loss_nats\nadamw,64,640,4\n")
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        read([tmp_path / "nowhere"])
    with pytest.raises(
        ValueError, match=r"sweep is the folder of a sweep and .*table\.csv is a table: read one or the other"
    ):
        read([table, sweep])
    with pytest.raises(ValueError, match="units and --rename are for tables"):
        read([sweep], TableOptions(loss_in="bits"))


def test_read_of_one_sweep_is_its_load_with_the_baseline_and_targets_asked_for(tmp_path: Path) -> None:
    write_runs(LAB, tmp_path)
    assert_frame_equal(read([tmp_path]).runs, load(tmp_path).runs)
    assert read([tmp_path]).manifest == load(tmp_path).manifest
    asked = read([tmp_path], TableOptions(), "muon", (2.15,))
    assert (asked.manifest.baseline, asked.manifest.targets_nats) == ("muon", (2.15,))
    assert set(targets(asked)["target_loss_nats"]) == {2.15}
    with pytest.raises(ValueError, match="--baseline mun: no run of that optimizer; did you mean 'muon'"):
        read([tmp_path], baseline="mun")


def test_read_unites_sweeps_and_takes_a_run_of_both_once_where_it_finished(tmp_path: Path) -> None:
    small, large = replace(LAB, targets=(2.2,)), replace(LAB, batches=(4096, 16384), targets=(2.1,))
    started = [replace(run, status="running") if run.batch == 4096 else run for run in plan(small)]
    both = read([sweep_in(tmp_path / "small", small, started), sweep_in(tmp_path / "large", large)])
    expected = records(replace(LAB, batches=(1024, 4096, 16384), targets=(2.2, 2.1)))
    assert_frame_equal(both.runs, expected.runs)
    assert_frame_equal(both.evaluations, expected.evaluations)
    assert both.manifest.targets_nats == (2.2, 2.1)
    assert set(both.evaluations.columns) == set(EVALUATION_COLUMNS)


def test_read_refuses_sweeps_of_several_baselines_unless_one_is_named(tmp_path: Path) -> None:
    folders = [sweep_in(tmp_path / name, LAB) for name in ("a", "b")]
    manifest = read_json(tmp_path / "b" / "sweep.json")
    write_json(tmp_path / "b" / "sweep.json", manifest | {"baseline": "muon"})
    with pytest.raises(ValueError, match=r"several baselines \(adamw in .*a, muon in .*b\): name one with --baseline"):
        read(folders)
    assert read(folders, baseline="muon").manifest.baseline == "muon"

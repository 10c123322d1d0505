"""Outside tables as records: runs, targets, baseline, settings."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from analysis.inputs.outside import from_tables
from analysis.inputs.records import Records
from analysis.quantities.targets import targets
from tests.synthetic import Laboratory, records

LAB = Laboratory(noise=0.0, batches=(1024, 4096))


def curves_of(lab: Laboratory) -> pl.DataFrame:
    """Return the planted curves as another project would hand them over."""
    made = records(lab)
    runs = made.runs.select("run_id", "optimizer", "global_batch_tokens", "peak_lr", "protocol", "warmup_tokens")
    return made.evaluations.join(
        runs.with_columns(seed=made.runs["data_seed"], token_budget=made.runs["token_budget"]), on="run_id"
    ).select(
        *runs.columns, "seed", "token_budget", "tokens_seen", "train_seconds", val_loss_nats="val_loss_averaged_nats"
    )


def from_csv(folder: Path, text: str, name: str = "table.csv", **options: object) -> Records:
    """Read a table whose columns are given by short names."""
    ours = {"opt": "optimizer", "batch": "global_batch_tokens", "seen": "tokens_seen", "loss": "val_loss_nats"}
    ours |= {"budget": "token_budget", "final": "final_loss_nats", "target": "target_loss_nats"}
    ours |= {"T": "tokens_to_target", "lr": "peak_lr"}
    header, _, rows = text.partition("\n")
    (folder / name).write_text(",".join(ours.get(column, column) for column in header.split(",")) + "\n" + rows)
    return from_tables([folder / name], **options)  # type: ignore[arg-type]


def test_curves_give_the_tokens_that_the_records_of_the_same_sweep_give(tmp_path: Path) -> None:
    curves_of(LAB).write_parquet(tmp_path / "lab.parquet")
    outside = from_tables([tmp_path / "lab.parquet"], targets=LAB.targets)
    columns = ["run_id", "target_loss_nats", "status", "tokens_to_target", "steps_to_target", "peak_lr", "data_seed"]
    columns += ["warmup_tokens", "protocol", "tokens_seen", "train_seconds_to_target", "lowest_loss_nats"]
    assert_frame_equal(targets(outside).select(columns), targets(records(LAB)).select(columns))
    assert set(outside.runs["stop_reason"]) == {"budget"}
    assert outside.outside
    assert not records(LAB).outside


def test_runs_without_names_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    named, unnamed = tmp_path / "named.csv", tmp_path / "unnamed.csv"
    curves_of(LAB).write_csv(named)
    curves_of(LAB).drop("run_id").write_csv(unnamed)
    by_name, by_settings = (from_tables([path], targets=LAB.targets) for path in (named, unnamed))
    assert by_settings.runs["run_id"].n_unique() == by_name.runs.height
    key = ["optimizer", "global_batch_tokens", "peak_lr", "data_seed", "target_loss_nats"]
    first, second = (targets(made).drop("run_id").sort(key) for made in (by_name, by_settings))
    assert_frame_equal(first, second)
    assert by_settings.runs["run_id"].str.starts_with("unnamed-adamw-b1024-lr0.02-s0-d").sum() == 1


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(24)), is_named=st.booleans())
def test_from_tables_gives_the_same_for_any_order_of_rows(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], is_named: bool
) -> None:
    rows = pl.DataFrame(
        {
            "run_id": [f"r{number // 3}" for number in range(24)],
            "optimizer": [("adamw", "muon")[number // 12] for number in range(24)],
            "global_batch_tokens": [(64, 128)[number // 6 % 2] for number in range(24)],
            "weight_decay": [(0.0, 0.1)[number // 3 % 2] for number in range(24)],
            "grad_norm": np.linspace(1, 2, 24),
            "tokens_seen": [1024 * 2 ** (number % 3) for number in range(24)],
            "val_loss_nats": [4.0 - number % 3 + 0.01 * (number // 3) for number in range(24)],
        }
    )
    rows = rows if is_named else rows.drop("run_id")
    folder = tmp_path_factory.mktemp("order")
    rows.write_csv(folder / "table.csv")
    expected = from_tables([folder / "table.csv"])
    rows[order].write_csv(folder / "table.csv")
    shuffled = from_tables([folder / "table.csv"])
    assert_frame_equal(shuffled.runs, expected.runs)
    assert_frame_equal(shuffled.evaluations, expected.evaluations)
    assert (shuffled.manifest, shuffled.targets_by_model, shuffled.notes) == (
        expected.manifest,
        expected.targets_by_model,
        expected.notes,
    )
    assert set(expected.runs["tuning"]) == {"weight_decay=0.0", "weight_decay=0.1"}


def test_settings_that_vary_within_a_cell_are_its_tuning(tmp_path: Path) -> None:
    text = "opt,batch,budget,final,momentum,betas,width,label\n"
    for number, (optimizer, batch) in enumerate((o, b) for o in ("adamw", "muon") for b in (64, 128)):
        for momentum in ("0.9", "0.95"):
            text += (
                f"{optimizer},{batch},1024,3.{number}{momentum[-1]},{momentum},b{batch},256,run {number}{momentum}\n"
            )
    made = from_csv(tmp_path, text)
    assert set(made.runs["tuning"]) == {"momentum=0.9", "momentum=0.95"}
    assert made.notes == ("columns ignored, since they change along a run or no two runs share their values: label",)


def test_settings_are_named_in_the_order_of_their_names_and_blanks_left_out(tmp_path: Path) -> None:
    text = "opt,batch,budget,final,wd,mom\n"
    text += "".join(
        f"muon,{b},1024,3.5,{wd},{m}\n" for b in (64, 128) for wd, m in ((1, 0.9), (1, 0.95), (2, 0.9), ("", 0.9))
    )
    assert set(from_csv(tmp_path, text).runs["tuning"]) == {
        "mom=0.9, wd=1",
        "mom=0.95, wd=1",
        "mom=0.9, wd=2",
        "mom=0.9",
    }


def test_setting_that_alone_tells_two_curves_apart_is_one_though_its_values_do_not_come_back(tmp_path: Path) -> None:
    text = "opt,batch,seen,loss,wd\n" + "".join(
        f"muon,64,{n},{4 - n / 1024 + wd},{wd}\n" for wd in (0, 1) for n in (64, 128)
    )
    made = from_csv(tmp_path, text)
    assert made.runs["tuning"].to_list() == ["wd=0", "wd=1"]
    assert made.evaluations.group_by("run_id").len()["len"].to_list() == [2, 2]


def test_column_that_may_tell_runs_apart_without_a_common_mark_is_refused(tmp_path: Path) -> None:
    text = "opt,batch,seen,loss,wd\n" + "".join(f"muon,64,{640 + 10 * n},{4 - n / 64},{n % 2}\n" for n in range(8))
    with pytest.raises(ValueError, match=r"row 3, column 'wd': goes back and forth along what would be one run; name"):
        from_csv(tmp_path, text)


def test_seeds_states_and_measurements_are_no_settings(tmp_path: Path) -> None:
    text = "run_id,opt,batch,budget,final,data_seed,State,compiled,gpu_hours\n"
    text += "".join(
        f"r{n},muon,{64 + n // 4},1024,3.5,{n % 2},{'ok' if n % 4 else 'lost'},True,{n}\n" for n in range(8)
    )
    made = from_csv(tmp_path, text)
    assert set(made.runs["tuning"]) == {""}
    assert made.notes == (
        "columns ignored, since they change along a run or no two runs share their values: State, data_seed, gpu_hours",
        f"{tmp_path / 'table.csv'}: column data_seed looks like seed: --rename data_seed=seed",
    )
    with pytest.raises(ValueError, match="tell repeated runs apart by a column seed or run_id"):
        from_csv(tmp_path, "opt,batch,budget,final,data_seed\nmuon,64,1024,3.5,0\nmuon,64,1024,3.5,1\n")


def test_finals_without_a_loss_are_left_out_and_counted(tmp_path: Path) -> None:
    made = from_csv(tmp_path, "opt,batch,budget,final\nadamw,64,1280,3.5\nmuon,64,1280,\n")
    assert made.runs["optimizer"].to_list() == ["adamw"]
    assert made.notes == (f"{tmp_path / 'table.csv'}: 1 run without a final loss left out",)


def test_counters_along_a_curve_are_no_settings(tmp_path: Path) -> None:
    text = "opt,batch,seed,seen,loss,epoch,_step,grad\n"
    text += "".join(f"muon,64,{s},{64 * n},{4 - n / 8},{n // 2},{n},{s + n / 7}\n" for s in (0, 1) for n in range(1, 5))
    made = from_csv(tmp_path, text)
    assert made.runs["tuning"].to_list() == ["", ""]
    assert "_step, epoch, grad" in made.notes[0]


def test_run_with_a_loss_that_is_no_number_diverged(tmp_path: Path) -> None:
    text = "opt,batch,seen,loss,seed\nmuon,64,640,4,0\nmuon,64,1280,nan,0\nmuon,64,640,4,1\nmuon,64,1280,3,1\n"
    made = from_csv(tmp_path, text, targets=[3.5])
    assert made.runs["status"].to_list() == ["diverged", "finished"]
    assert made.runs["stop_reason"].to_list() == ["non_finite_loss", "budget"]
    assert targets(made)["status"].to_list() == ["diverged", "reached"]
    assert made.evaluations["val_loss_nats"].to_list() == [4.0, None, 4.0, 3.0]


def test_curve_that_ends_before_its_budget_was_stopped_for_an_unknown_reason(tmp_path: Path) -> None:
    made = from_csv(tmp_path, "opt,batch,seen,loss,budget\nmuon,64,640,4,1290\nmuon,64,1152,3,1290\n")
    row = made.runs.row(0, named=True)
    assert (row["stop_reason"], row["token_budget"], row["realized_tokens"]) == (None, 1290, 1280)
    assert (row["tokens_seen"], row["step"]) == (1152, 18)


def test_protocol_decides_which_loss_a_curve_gives(tmp_path: Path) -> None:
    text = "opt,batch,protocol,seen,loss\n" + "".join(
        f"muon,64,{protocol},{tokens},{loss}\n"
        for protocol in ("constant_ema", "mid_schedule", "")
        for tokens, loss in ((640, 4), (1280, 3))
    )
    made = from_csv(tmp_path, text, targets=[3.5])
    found = targets(made).sort("protocol")
    assert found["protocol"].to_list() == ["constant_ema", "mid_schedule", "unstated"]
    assert found["tokens_to_target"].to_list() == pytest.approx([640 * math.sqrt(2)] * 3)
    averaged = made.evaluations.filter(pl.col("val_loss_averaged_nats").is_not_null())
    assert averaged["run_id"].str.contains("constant_ema").all()
    assert averaged.height == 2


def test_finals_are_runs_of_one_evaluation_and_need_no_target(tmp_path: Path) -> None:
    made = from_csv(tmp_path, "opt,batch,budget,final\nadamw,64,1280,3.5\nmuon,64,1280,inf\n")
    assert made.runs.select("optimizer", "token_budget", "status", "stop_reason", "tokens_seen").rows() == [
        ("adamw", 1280, "finished", "budget", 1280),
        ("muon", 1280, "diverged", "non_finite_loss", 1280),
    ]
    assert made.evaluations.select("tokens_seen", "val_loss_nats", "step").rows() == [(1280, 3.5, 20), (1280, None, 20)]
    assert (made.manifest.targets_nats, made.targets_by_model) == ((), {})
    assert targets(made).is_empty()


def test_table_of_targets_is_given_as_it_stands(tmp_path: Path) -> None:
    made = from_csv(
        tmp_path,
        "model,opt,batch,seed,target,T,status,train_seconds\n"
        "85M,adamw,64,0,3.5,6400,reached,12\n"
        "85M,adamw,64,0,3.0,9600,not_reached,20\n"
        "85M,adamw,128,0,3.5,,diverged,\n",
    )
    columns = ["target_loss_nats", "status", "tokens_to_target", "steps_to_target", "bound_tokens", "tokens_seen"]
    rows = made.given.sort("global_batch_tokens", "target_loss_nats").select(*columns, "train_seconds_to_target").rows()
    assert rows == [
        (3.0, "not_reached", None, None, 9600.0, 9600, None),
        (3.5, "reached", 6400.0, 100.0, None, None, 12.0),
        (3.5, "diverged", None, None, None, None, None),
    ]
    assert_frame_equal(targets(made), made.given.sort("run_id", "target_loss_nats"))
    assert made.runs.select("global_batch_tokens", "status").sort("global_batch_tokens").rows() == [
        (64, "finished"),
        (128, "diverged"),
    ]
    assert made.manifest.targets_nats == (3.0, 3.5)


def test_targets_named_choose_among_the_rows_of_a_table_of_targets(tmp_path: Path) -> None:
    text = "opt,batch,target,T\nadamw,64,3.5,640\nadamw,64,3.0,1280\n"
    assert from_csv(tmp_path, text, targets=[3.0]).given["tokens_to_target"].to_list() == [1280]
    with pytest.raises(
        ValueError, match=r"no run has a target loss of 2\.5 nats: the table has the targets 3\.0, 3\.5"
    ):
        from_csv(tmp_path, text, targets=[2.5])


def test_model_without_a_name_is_called_by_its_size(tmp_path: Path) -> None:
    text = "opt,batch,budget,final,num_params_nonembedding\nadamw,64,1280,3.5,{}\nadamw,64,1280,3.4,{}\n"
    assert from_csv(tmp_path, text.format(10, 20)).runs["model"].to_list() == ["N=10", "N=20"]
    assert from_csv(tmp_path, "opt,batch,budget,final\nadamw,64,1280,3.5\n").runs["model"].to_list() == ["unnamed"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "opt,batch,seen,loss\nadamw,64,640,4\nadamw,64,1280,3\nadamw,64,640,4.1\n",
            r"row 4, column 'tokens_seen': the same run at 640 as .*table.csv, row 2; drop one, or tell repeated runs",
        ),
        (
            "opt,batch,budget,final\nadamw,64,640,4\nadamw,64,640,4\n",
            r"row 3, column 'token_budget': the same run at 640 as .*table.csv, row 2; drop one",
        ),
        (
            "opt,batch,target,T\nadamw,64,3.5,640\nadamw,64,3.5,1280\n",
            r"row 3, column 'target_loss_nats': the same run at 3\.5 as .*table.csv, row 2; drop one",
        ),
        (
            "run_id,opt,batch,seen,loss,lr\na,adamw,64,640,4,0.1\na,adamw,64,1280,3,0.2\n",
            r"row 3, column 'peak_lr': 0\.2, but 0\.1 in row 2 of the same run, a; a setting has one value a run",
        ),
        (
            "run_id,opt,batch,seen,loss\na,adamw,64,640,4\n,adamw,64,1280,3\n",
            "row 3, column 'run_id': no value, while other rows have one",
        ),
        (
            "model,opt,batch,budget,final,num_params_nonembedding\ns,adamw,64,640,4,10\ns,muon,64,640,4,20\n",
            "model s has 10 and 20 num_params_nonembedding",
        ),
    ],
)
def test_from_tables_refuses_in_one_line_what_is_no_set_of_runs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        from_csv(tmp_path, text)
    assert "\n" not in str(error.value)


def test_run_that_is_in_two_tables_is_named_with_both(tmp_path: Path) -> None:
    text = "optimizer,global_batch_tokens,token_budget,final_loss_nats\nadamw,64,640,4\n"
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(text)
    with pytest.raises(
        ValueError, match=r"b\.csv, row 2, column 'token_budget': the same run at 640 as .*a\.csv, row 2"
    ):
        from_tables([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_tables_of_several_kinds_and_columns_are_one_set_of_records(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "optimizer,global_batch_tokens,token_budget,final_loss_nats,seed\nadamw,64,640,4,1\n"
    )
    (tmp_path / "b.csv").write_text(
        "optimizer,global_batch_tokens,tokens_seen,val_loss_nats\nmuon,64,640,4\nmuon,64,1280,3\n"
    )
    (tmp_path / "c.csv").write_text("optimizer,global_batch_tokens,target_loss_nats,steps_to_target\nlion,64,3.5,10\n")
    made = from_tables([tmp_path / name for name in ("a.csv", "b.csv", "c.csv")], targets=[3.5])
    assert made.runs.sort("optimizer").select("optimizer", "data_seed").rows() == [
        ("adamw", 1),
        ("lion", None),
        ("muon", None),
    ]
    assert targets(made).sort("optimizer").select("optimizer", "tokens_to_target").rows() == [
        ("lion", 640.0),
        ("muon", pytest.approx(640 * math.sqrt(2))),
    ]


@pytest.mark.parametrize(
    ("optimizers", "asked", "baseline"),
    [
        ("adamw muon", None, "adamw"),
        ("AdamW lion", None, "AdamW"),
        ("sgd muon", None, "muon"),
        ("adamw muon", "muon", "muon"),
    ],
)
def test_baseline_is_asked_for_or_adamw_or_the_first_by_name(
    tmp_path: Path, optimizers: str, asked: str | None, baseline: str
) -> None:
    text = "opt,batch,budget,final\n" + "".join(f"{name},64,1280,3.5\n" for name in optimizers.split())
    assert from_csv(tmp_path, text, baseline=asked).manifest.baseline == baseline


def test_baseline_that_no_run_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--baseline adam: no run of that optimizer; did you mean 'adamw'"):
        from_csv(tmp_path, "opt,batch,budget,final\nadamw,64,1280,3.5\n", baseline="adam")


def test_targets_not_named_are_what_every_cell_reached_and_where_the_slowest_was_before(tmp_path: Path) -> None:
    curve = {640: 5.0, 1280: 4.0, 2560: 3.5, 5120: 3.0, 10240: 2.5}
    text = "model,opt,batch,seed,seen,loss\n"
    text += "".join(f"s,adamw,64,0,{tokens},{loss}\n" for tokens, loss in curve.items())
    text += "".join(f"s,adamw,128,0,{tokens},{loss + 0.001}\n" for tokens, loss in curve.items())
    text += "".join(f"s,adamw,128,1,{tokens},{loss + 0.3}\n" for tokens, loss in curve.items())
    text += "s,adamw,256,0,640,9\ns,adamw,256,0,1280,nan\n"
    text += "m,adamw,64,0,640,3\nm,adamw,64,0,1280,2\n"
    made = from_csv(tmp_path, text)
    assert made.targets_by_model == {"m": (2.0,), "s": (2.51, 3.01, 3.51)}
    assert made.manifest.targets_nats == (2.0, 2.51, 3.01, 3.51)
    assert made.notes == ("target losses in nats, chosen from the curves: m: 2.0; s: 2.51, 3.01, 3.51",)
    asked = targets(made).group_by("model").agg(pl.col("target_loss_nats").unique().sort())
    assert dict(asked.rows()) == {"m": [2.0], "s": [2.51, 3.01, 3.51]}


def test_curves_that_never_fall_have_no_targets_and_no_error(tmp_path: Path) -> None:
    for text in ("opt,batch,seen,loss\nadamw,64,640,3\nadamw,64,1280,3.5\n", "opt,batch,seen,loss\nadamw,64,640,3\n"):
        made = from_csv(tmp_path, text)
        assert targets(made).is_empty()
        assert made.notes == (
            "no target loss could be chosen: no curve that counts falls from one evaluation to another",
        )


def test_column_by_a_usual_name_of_ours_is_noted_with_the_rename(tmp_path: Path) -> None:
    text = "opt,batch,budget,final,learning_rate\n" + "".join(
        f"{name},64,1280,3.5,{rate}\n" for name in ("adamw", "muon") for rate in (0.1, 0.2)
    )
    (note,) = from_csv(tmp_path, text).notes
    assert note.endswith("column learning_rate looks like peak_lr: --rename learning_rate=peak_lr")
    assert from_csv(tmp_path, text.replace("learning_rate", "lr")).notes == ()


def test_chart_of_weights_and_biases_is_refused_with_what_to_export(tmp_path: Path) -> None:
    name = "adamw-b64 - val/loss"
    (tmp_path / "wide.csv").write_text(f"Step,{name},{name}__MIN,{name}__MAX\n100,4,4,4\n")
    with pytest.raises(
        ValueError, match=r"a column a run \('adamw-b64 - val/loss'\).* export the history in long form"
    ):
        from_tables([tmp_path / "wide.csv"])

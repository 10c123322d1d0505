"""Outside tables: what they mean in our units, and what is said of those that are wrong."""

import math
from pathlib import Path

import polars as pl
import pytest

from analysis.inputs.table_files import ROW, read_file
from analysis.inputs.table_schemas import REQUIRED, TABLE_SCHEMAS
from analysis.inputs.tables import Table, TableOptions, read_tables

CURVES = """optimizer,global_batch_tokens,tokens_seen,val_loss_nats,seed,peak_lr
adamw,1024,0,4.5,0,0.01
adamw,1024,2048,3.5,0,0.01
muon,1024,2048,3.25,0,0.02
"""
FINALS = """optimizer,global_batch_tokens,token_budget,final_loss_nats
adamw,1024,4096,3.5
muon,1024,4096,3.25
"""
TARGETS = """optimizer,global_batch_tokens,target_loss_nats,steps_to_target
adamw,1024,3.5,10
muon,1024,3.5,8
"""


def read(folder: Path, text: str, name: str = "table.csv", **options: object) -> Table:
    path = folder / name
    path.write_text(text)
    return read_tables([path], TableOptions(**options))[0]  # type: ignore[arg-type]


def test_read_tables_knows_the_kind_of_a_table_by_its_columns(tmp_path: Path) -> None:
    kinds = [read(tmp_path, text).kind for text in (CURVES, FINALS, TARGETS)]
    assert kinds == ["curves", "finals", "targets"]


@pytest.mark.parametrize("text", [CURVES, FINALS, TARGETS])
def test_read_tables_gives_the_same_from_all_three_formats(tmp_path: Path, text: str) -> None:
    table = read(tmp_path, text)
    values = pl.read_csv(tmp_path / "table.csv")
    values.write_ndjson(tmp_path / "table.jsonl")
    values.write_parquet(tmp_path / "table.parquet")
    for name in ("table.jsonl", "table.parquet"):
        other = read_tables([tmp_path / name], TableOptions())[0]
        assert other.frame.drop(ROW).equals(table.frame.drop(ROW))
        assert (other.kind, other.others) == (table.kind, table.others)


def test_read_tables_keeps_the_numbers_and_fills_what_is_not_there_with_nulls(tmp_path: Path) -> None:
    frame = read(tmp_path, CURVES).frame
    assert frame.select(
        "optimizer", "global_batch_tokens", "tokens_seen", "val_loss_nats", "seed", "peak_lr"
    ).rows() == [
        ("adamw", 1024, 0, 4.5, 0, 0.01),
        ("adamw", 1024, 2048, 3.5, 0, 0.01),
        ("muon", 1024, 2048, 3.25, 0, 0.02),
    ]
    assert frame[ROW].to_list() == [2, 3, 4]
    assert set(frame.columns) == {*TABLE_SCHEMAS["curves"], ROW}
    assert frame["warmup_tokens"].null_count() == 3
    assert frame.schema["warmup_tokens"] == pl.Int64


def test_batch_in_sequences_is_multiplied_by_their_length(tmp_path: Path) -> None:
    text = CURVES.replace("1024,", "2,")
    frame = read(tmp_path, text, batch_in="sequences", sequence_length=512).frame
    assert frame["global_batch_tokens"].to_list() == [1024] * 3
    assert frame["tokens_seen"].to_list() == [0, 2048, 2048]


@pytest.mark.parametrize(("unit", "tokens"), [("tokens", 4096), ("sequences", 4096 * 512), ("steps", 4096 * 1024)])
def test_tokens_in_holds_for_all_counts_of_tokens_but_the_batch(tmp_path: Path, unit: str, tokens: int) -> None:
    text = "optimizer,global_batch_tokens,token_budget,warmup_tokens,final_loss_nats\nadamw,1024,4096,4096,3.5\n"
    frame = read(tmp_path, text, tokens_in=unit, sequence_length=512).frame
    assert frame.select("global_batch_tokens", "token_budget", "warmup_tokens").row(0) == (1024, tokens, tokens)


def test_steps_are_steps_of_the_batch_in_our_units(tmp_path: Path) -> None:
    text = "optimizer,global_batch_tokens,tokens_seen,val_loss_nats\nadamw,64,100,3.5\n"
    options = {"batch_in": "sequences", "tokens_in": "steps", "sequence_length": 512}
    assert read(tmp_path, text, **options).frame["tokens_seen"].to_list() == [64 * 512 * 100]


def test_steps_to_target_are_steps_whatever_the_unit_of_tokens(tmp_path: Path) -> None:
    frame = read(tmp_path, TARGETS, tokens_in="sequences", sequence_length=512).frame
    assert frame["tokens_to_target"].to_list() == [10240, 8192]


@pytest.mark.parametrize(
    ("text", "column"), [(CURVES, "val_loss_nats"), (FINALS, "final_loss_nats"), (TARGETS, "target_loss_nats")]
)
def test_losses_in_bits_are_multiplied_by_ln_2(tmp_path: Path, text: str, column: str) -> None:
    nats, bits = read(tmp_path, text).frame, read(tmp_path, text, loss_in="bits").frame
    assert bits[column].to_list() == pytest.approx([loss * math.log(2) for loss in nats[column]])


def test_renames_give_columns_our_names(tmp_path: Path) -> None:
    text = CURVES.replace("val_loss_nats", "val/loss").replace("peak_lr", "lr")
    frame = read(tmp_path, text, renames={"val/loss": "val_loss_nats", "lr": "peak_lr"}).frame
    assert frame["val_loss_nats"].to_list() == [4.5, 3.5, 3.25]
    assert frame["peak_lr"].to_list() == [0.01, 0.01, 0.02]


def test_renames_may_concern_one_of_several_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CURVES.replace("val_loss_nats", "loss"))
    (tmp_path / "b.csv").write_text(FINALS)
    tables = read_tables([tmp_path / "a.csv", tmp_path / "b.csv"], TableOptions(renames={"loss": "val_loss_nats"}))
    assert [table.kind for table in tables] == ["curves", "finals"]


def test_rows_without_a_loss_are_left_out_and_keep_the_others_in_their_rows(tmp_path: Path) -> None:
    blanks = CURVES.replace("2048,3.5,0,0.01", ",,,").replace("3.25", "NA")
    assert read(tmp_path, blanks).frame[ROW].to_list() == [2]


def test_blank_lines_count_as_rows_and_spaces_around_values_do_not(tmp_path: Path) -> None:
    text = CURVES.replace("muon,1024,2048", "\n muon , 1024, 2048 ")
    frame = read(tmp_path, text).frame
    assert frame[ROW].to_list() == [2, 3, 5]
    assert frame.row(2, named=True)["optimizer"] == "muon"


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-Infinity"])
def test_loss_that_is_not_finite_is_kept_as_such(tmp_path: Path, value: str) -> None:
    losses = read(tmp_path, CURVES.replace("3.25", value)).frame["val_loss_nats"]
    assert losses.is_finite().to_list() == [True, True, False]


def test_json_may_have_nan_whole_numbers_as_text_and_columns_in_some_rows(tmp_path: Path) -> None:
    text = """{"optimizer": "adamw", "global_batch_tokens": 1024, "tokens_seen": 2048, "val_loss_nats": NaN}

{"optimizer": "adamw", "global_batch_tokens": "1024", "tokens_seen": 4096.0, "val_loss_nats": 3, "seed": 1}
"""
    frame = read(tmp_path, text, "table.jsonl").frame
    assert frame.select(ROW, "global_batch_tokens", "tokens_seen", "seed").rows() == [
        (1, 1024, 2048, None),
        (3, 1024, 4096, 1),
    ]
    assert math.isnan(frame["val_loss_nats"][0])
    assert frame["val_loss_nats"][1] == 3.0


def test_status_is_reached_where_nothing_is_said(tmp_path: Path) -> None:
    text = """optimizer,global_batch_tokens,target_loss_nats,tokens_to_target,status
adamw,1024,3.5,10240,
adamw,2048,3.5,10240,not_reached
adamw,4096,3.5,,diverged
"""
    frame = read(tmp_path, text).frame
    assert frame["status"].to_list() == ["reached", "not_reached", "diverged"]
    assert frame["tokens_to_target"].to_list() == [10240, 10240, None]


def test_steps_and_tokens_to_a_target_may_differ_by_a_step(tmp_path: Path) -> None:
    text = "optimizer,global_batch_tokens,target_loss_nats,tokens_to_target,steps_to_target\nadamw,1024,3.5,{},10\n"
    assert read(tmp_path, text.format(9700)).frame["tokens_to_target"].to_list() == [9700]
    with pytest.raises(
        ValueError, match=r"row 2, column 'steps_to_target': 10 steps of 1024 tokens are not 9000 tokens"
    ):
        read(tmp_path, text.format(9000))


def replaced(text: str, row: int, values: str) -> str:
    """Return a CSV with other values in one row, as a spreadsheet counts."""
    lines = text.splitlines()
    lines[row - 1] = values
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "table.csv: the file is empty"),
        ("\n\n", "table.csv, row 1: no names of columns"),
        (CURVES.splitlines()[0], "table.csv: no rows below the names of the columns"),
        (CURVES.splitlines()[0] + "\n,,,,,\n", "table.csv: no rows below the names of the columns"),
        (CURVES.replace(",", ";"), "table.csv, row 1: columns must be separated by commas"),
        (CURVES.replace("seed", "peak_lr"), "table.csv, row 1: two columns are called 'peak_lr'"),
        (replaced(CURVES, 3, "adamw,1024,2048,3.5,0,0.01,7"), "table.csv, row 3: 7 values for 6 columns"),
        (
            CURVES.replace("val_loss_nats", "val_loss"),
            "table.csv: column 'val_loss_nats' of a table of curves is missing; did you mean 'val_loss'? Then: "
            "--rename val_loss=val_loss_nats",
        ),
        (
            CURVES.replace("global_batch_tokens", "batch_size"),
            "table.csv: column 'global_batch_tokens' of a table of curves is missing; did you mean 'batch_size'? Then: "
            "--rename batch_size=global_batch_tokens",
        ),
        (
            TARGETS.replace("steps_to_target", "took"),
            "table.csv: column 'steps_to_target' or 'tokens_to_target' of a table of targets is missing; the file has "
            "optimizer, global_batch_tokens, target_loss_nats, took",
        ),
        (
            "a,b\n1,2\n",
            "table.csv: no column 'val_loss_nats' or 'final_loss_nats' or 'target_loss_nats', so this is no table of "
            "curves, finals or targets; the file has a, b",
        ),
        (
            CURVES.replace("seed", "final_loss_nats"),
            "table.csv: columns of 2 kinds of table: 'tokens_seen' (curves), 'val_loss_nats' (curves), "
            "'final_loss_nats' (finals); a file has one kind: drop the others",
        ),
        (
            CURVES.replace("seed", "global_batch_sequences"),
            "table.csv: columns 'global_batch_tokens' and 'global_batch_sequences' give one quantity in two units: "
            "drop one of them",
        ),
        (
            FINALS.replace("3.5", "").replace("3.25", ""),
            "table.csv, row 2, column 'final_loss_nats': no value, in this row and all others",
        ),
        (
            CURVES.replace("seed", "protocol").replace(",0,0.0", ",constant-ema,0.0"),
            "table.csv, row 2, column 'protocol': 'constant-ema' is unknown; did you mean 'constant_ema'?",
        ),
        (
            CURVES.replace("seed", "token_budget").replace(",0,0.0", ",1024,0.0").replace("3.25,1024", "3.25,1000"),
            "table.csv, row 4, column 'token_budget': 1000 tokens are less than a batch of 1024; in another unit? "
            "(--tokens-in, --batch-in)",
        ),
        (
            CURVES.replace("seed", "token_budget").replace(",0,0.0", ",1024,0.0").replace("2048,3.25", "4096,3.25"),
            "table.csv, row 4, column 'tokens_seen': 4096 tokens are more than twice token_budget, 1024; in another "
            "unit? (--tokens-in, --batch-in)",
        ),
    ],
)  # fmt: skip
def test_read_tables_names_the_file_row_and_column_of_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"table\.csv") as error:
        read(tmp_path, text)
    assert str(error.value) == f"{tmp_path}/{message}"


IN_ANOTHER_UNIT = "tokens are less than a batch of 1024; in another unit? (--tokens-in, --batch-in)"


@pytest.mark.parametrize(
    ("text", "row", "column", "value", "said"),
    [
        (CURVES, 3, "optimizer", "", "no value"),
        (CURVES, 4, "tokens_seen", "", "no value"),
        (CURVES, 3, "global_batch_tokens", "big", "'big' is no number"),
        (CURVES, 3, "global_batch_tokens", "-1024", "-1024 is not above zero"),
        (CURVES, 4, "global_batch_tokens", "0", "0 is not above zero"),
        (CURVES, 4, "global_batch_tokens", "1024.5", "1024.5 is not a whole number"),
        (CURVES, 4, "global_batch_tokens", "nan", "nan is not a finite number"),
        (CURVES, 2, "tokens_seen", "-2048", "-2048 is below zero"),
        (CURVES, 4, "tokens_seen", "2", f"2 {IN_ANOTHER_UNIT}"),
        (CURVES, 2, "val_loss_nats", "-3.5", "-3.5 is not above zero"),
        (FINALS, 3, "token_budget", "0", "0 is not above zero"),
        (FINALS, 3, "token_budget", "4", f"4 {IN_ANOTHER_UNIT}"),
        (TARGETS, 3, "target_loss_nats", "NaN", "nan is not a finite number"),
        (
            TARGETS, 3, "steps_to_target", "",
            "no value; of a run that fell short write where it ended, with status not_reached",
        ),
    ],
)  # fmt: skip
def test_read_tables_names_the_value_that_is_wrong(
    tmp_path: Path, text: str, row: int, column: str, value: str, said: str
) -> None:
    lines = [line.split(",") for line in text.splitlines()]
    lines[row - 1][lines[0].index(column)] = value
    with pytest.raises(ValueError, match=r"table\.csv") as error:
        read(tmp_path, "".join(",".join(line) + "\n" for line in lines))
    assert str(error.value) == f"{tmp_path}/table.csv, row {row}, column '{column}': {said}"


def test_error_about_a_renamed_column_has_both_names(tmp_path: Path) -> None:
    text = replaced(CURVES, 3, "adamw,many,2048,3.5,0,0.01").replace("global_batch_tokens", "bs")
    with pytest.raises(ValueError, match=r"row 3, column 'bs' \(global_batch_tokens\): 'many' is no number"):
        read(tmp_path, text, renames={"bs": "global_batch_tokens"})


def test_batch_below_a_sequence_is_in_another_unit(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"row 2.* a batch of 1024 tokens is less than a sequence of 2048; in sequences"
    ):
        read(tmp_path, CURVES, tokens_in="sequences", sequence_length=2048)


def test_renames_that_miss_or_collide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'lrr' to rename to 'peak_lr'; one of: "):
        read(tmp_path, CURVES.replace("peak_lr", "rate"), renames={"lrr": "peak_lr"})
    with pytest.raises(ValueError, match="--rename seed=peak_lr, but there is another column 'peak_lr'; drop one"):
        read(tmp_path, CURVES, renames={"seed": "peak_lr"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_in": "sequences"}, "--batch-in sequences needs --sequence-length"),
        ({"tokens_in": "sequences"}, "--tokens-in sequences needs --sequence-length"),
        ({"loss_in": "bit"}, "--loss-in bit: did you mean 'bits'"),
        ({"sequence_length": 0}, "--sequence-length 0: expected a number above zero"),
        ({"renames": {"loss": "val_loss"}}, "'val_loss' is no column of ours; did you mean 'val_loss_nats'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.txt", b"a", "expected a table whose name ends in .csv, .jsonl, .ndjson, .parquet"),
        ("table.csv", b"optimizer,val_loss_nats\n\xff,1\n", "not a CSV file"),
        ("table.parquet", b"PAR1", "not a whole Parquet file"),
        ("table.jsonl", b'{"a": 1}\n{"a": \n', "table.jsonl, row 2: not a JSON object"),
        ("table.jsonl", b'{"a": 1}\n\n[1]\n', "table.jsonl, row 3: expected an object .* found list"),
        ("table.jsonl", b"\n\n", "table.jsonl: no rows"),
    ],
)
def test_read_file_says_in_one_line_why_a_file_is_no_table(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_file(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_json_value_of_another_form_is_refused_with_its_row(tmp_path: Path) -> None:
    row = '{{"optimizer": "adamw", "global_batch_tokens": 1024, "tokens_seen": {}, "val_loss_nats": 3}}\n'
    with pytest.raises(ValueError, match="row 2, column 'tokens_seen': 'soon' is no number"):
        read(tmp_path, row.format(2048) + row.format('"soon"'), "table.jsonl")
    with pytest.raises(ValueError, match=r"row 1, column 'tokens_seen': expected a number, not List"):
        read(tmp_path, row.format("[1]"), "table.jsonl")


def test_required_columns_are_columns_of_their_kind() -> None:
    for kind, names in REQUIRED.items():
        assert set(names) <= set(TABLE_SCHEMAS[kind])

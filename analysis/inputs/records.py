"""Records of a sweep as two frames with checked types: runs, and the evaluations along them."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from analysis.inputs.variants import first_variant, split_by_variants
from analysis.schemas import DIAGNOSTICS, EVALUATIONS, RUNS, TARGETS, Columns, polars_schema
from harness.record import RUN_COLUMNS, RunFolder, SweepManifest, complete, read_json, read_rows, write_atomically

pl.Config.set_engine_affinity("in-memory")  # the streaming engine keeps no row order and sums in any order

RUNS_PARQUET = "runs.parquet"
EVALUATIONS_PARQUET = "evaluations.parquet"
DIAGNOSTICS_PARQUET = "diagnostics.parquet"


@dataclass(frozen=True)
class Records:
    """Runs as they were recorded: manifest, a row per run (`schemas.RUNS`), a row per evaluation (`EVALUATIONS`).

    given: rows of `schemas.TARGETS` that an outside table states in place of curves.
    targets_by_model: losses to be reached by the runs of each model; None: the manifest's hold for all.
    notes: what the reader should know of how an outside table was read, a line each.
    outside: whether the runs come from tables of others, not from sweeps.
    diagnostics: what was measured of gradients and updates, a row per quantity (`DIAGNOSTICS`); empty where nothing
    was.
    """

    manifest: SweepManifest
    runs: pl.DataFrame
    evaluations: pl.DataFrame
    given: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=polars_schema(TARGETS)))
    targets_by_model: Mapping[str, Sequence[float]] | None = None
    notes: tuple[str, ...] = ()
    outside: bool = False
    diagnostics: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=polars_schema(DIAGNOSTICS)))

    def losses(self) -> pl.DataFrame:
        """Return (model, target_loss_nats): the losses that the runs of each model are to reach."""
        by_model = self.targets_by_model
        if by_model is None:
            by_model = dict.fromkeys(self.runs["model"].unique().sort(), self.manifest.targets_nats)
        pairs = [(model, loss) for model, losses in by_model.items() for loss in sorted(set(losses))]
        return pl.DataFrame(pairs, schema={"model": pl.String, "target_loss_nats": pl.Float64}, orient="row")


def load(folder: Path) -> Records:
    """Read a sweep's folder: its run folders if there are any, else the Parquet files.

    Only runs of the manifest count, and only those with at least one evaluation, which a finished run must have; a run
    still under way keeps its status. Rows that a resumed run wrote twice count once, the later one.

    Raises: ValueError naming the file that is missing, truncated or corrupt.
    """
    return from_frames(*read_frames(folder))


def read_frames(folder: Path) -> tuple[SweepManifest, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return manifest, runs, evaluations and diagnostics as they are in a sweep's folder, for `from_frames`."""
    manifest = _read_manifest(folder / "sweep.json")
    folders = [RunFolder(folder / "runs" / run.run_id) for run in manifest.runs]
    started = [run for run in folders if run.run.exists()]
    if started:
        runs, evaluations, diagnostics = _read_runs(started), _read_evaluations(started), _read_diagnostics(started)
    else:
        runs = _read_parquet(folder / RUNS_PARQUET, RUN_COLUMNS)
        evaluations = _read_parquet(folder / EVALUATIONS_PARQUET, EVALUATIONS)
        measured = (folder / DIAGNOSTICS_PARQUET).exists()
        diagnostics = _read_parquet(folder / DIAGNOSTICS_PARQUET, DIAGNOSTICS) if measured else _read_diagnostics([])
    for run_id in runs.filter(status="finished").join(evaluations, on="run_id", how="anti")["run_id"]:
        file, remedy = folder / EVALUATIONS_PARQUET, "get the whole file again"
        if started:
            run = RunFolder(folder / "runs" / run_id)
            file, remedy = run.evaluations, f"remove {run.run} to run this run again"
        raise ValueError(f"{file}: no evaluation of the finished run {run_id}; the record is corrupt: {remedy}")
    return manifest, runs, evaluations, diagnostics


def save(records: Records, folder: Path) -> None:
    """Write the Parquet files that `load` reads where there are no run folders, each whole or not at all; that of the
    diagnostics only where there are any.
    """
    frames = {RUNS_PARQUET: records.runs, EVALUATIONS_PARQUET: records.evaluations}
    if records.diagnostics.height:
        frames[DIAGNOSTICS_PARQUET] = records.diagnostics
    for name, frame in frames.items():
        content = io.BytesIO()
        frame.write_parquet(content)
        write_atomically(folder / name, content.getvalue())


def from_frames(
    manifest: SweepManifest, runs: pl.DataFrame, evaluations: pl.DataFrame, diagnostics: pl.DataFrame | None = None
) -> Records:
    """Keep the manifest's runs that have evaluations, with their stage, split by variants; sort all frames."""
    stages = pl.DataFrame(
        [(run.run_id, run.stage) for run in manifest.runs],
        schema={"run_id": pl.String, "stage": pl.String},
        orient="row",
    ).unique("run_id", keep="first", maintain_order=True)
    runs = (
        runs.select(*RUN_COLUMNS)
        .unique("run_id", keep="last", maintain_order=True)
        .join(stages, on="run_id", how="inner")
        .join(evaluations, on="run_id", how="semi")
    )
    runs = split_by_variants(runs.with_columns(tuning=pl.lit("")).select(*RUNS).sort("run_id"), manifest.tuned)
    manifest = manifest.model_copy(update={"baseline": first_variant(manifest.baseline, runs)})
    records = Records(manifest, runs, _in_order(evaluations, runs))
    if diagnostics is None:
        return records
    key = ["run_id", "step", "quantity", "group"]
    measured = diagnostics.unique(key, keep="last", maintain_order=True).join(runs, on="run_id", how="semi").sort(key)
    return replace(records, diagnostics=measured.select(*DIAGNOSTICS))


def _in_order(evaluations: pl.DataFrame, runs: pl.DataFrame) -> pl.DataFrame:
    """Return the evaluations of `runs` in order of run and step, the later of two rows for one step.

    The runs' order is sorted by, as a number: much faster than by their names.
    """
    order = runs.select("run_id", order=pl.int_range(pl.len(), dtype=pl.UInt32))
    is_last = pl.any_horizontal(pl.col("order", "step") != pl.col("order", "step").shift(-1))
    return (
        evaluations.join(order, on="run_id", maintain_order="left")
        .sort("order", "step", maintain_order=True)
        .filter(is_last.fill_null(value=True))
        .select(*EVALUATIONS)
    )


def _read_manifest(path: Path) -> SweepManifest:
    if not path.exists():
        raise ValueError(f"{path.parent}: no sweep.json, so this is not the folder of a sweep")
    return SweepManifest.parse(read_json(path), str(path))


def _read_runs(folders: list[RunFolder]) -> pl.DataFrame:
    rows = [complete(read_json(folder.run), RUN_COLUMNS, str(folder.run)) for folder in folders]
    return pl.DataFrame(rows, schema=polars_schema(RUN_COLUMNS), orient="row")


def _read_evaluations(folders: list[RunFolder]) -> pl.DataFrame:
    return _read_rows([folder.evaluations for folder in folders], EVALUATIONS)


def _read_diagnostics(folders: list[RunFolder]) -> pl.DataFrame:
    return _read_rows([folder.diagnostics for folder in folders], DIAGNOSTICS)


def _read_rows(paths: list[Path], columns: Columns) -> pl.DataFrame:
    """Parse all rows at once; only when that fails, file by file, so that the error names the culprit."""
    contents = [_whole_lines(path) for path in paths]
    schema = polars_schema(columns)
    try:
        if all(_has_columns(content, columns) for content in contents):
            frame = pl.read_ndjson(b"".join(contents) or b"\n", schema=schema)
            if not frame.select("run_id", "step", "tokens_seen").null_count().sum_horizontal().item():
                return frame
    except (pl.exceptions.PolarsError, ValueError, TypeError):
        pass
    rows = [row for path in paths for row in read_rows(path, columns)]
    return pl.DataFrame(rows, schema=schema, orient="row")


def _whole_lines(path: Path) -> bytes:
    """Return the file up to its last line break: what follows was torn by a crash."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _has_columns(content: bytes, columns: Columns) -> bool:
    """Check the first row, since the parser drops columns that it does not know in silence."""
    return not content or set(json.loads(content[: content.find(b"\n")])) <= set(columns)


def _read_parquet(path: Path, columns: Columns) -> pl.DataFrame:
    """Read one of the files; columns younger than it are null."""
    if not path.exists():
        raise ValueError(f"{path}: missing, and {path.parent / 'runs'} holds no run that has started")
    try:
        frame = pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error})") from None
    schema = polars_schema(columns)
    younger = [pl.lit(None, dtype=kind).alias(name) for name, kind in schema.items() if name not in frame.columns]
    return frame.with_columns(younger).select(schema.names())

"""What a command was given to read: folders of sweeps or outside tables, as one set of records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from analysis.inputs.outside import from_tables
from analysis.inputs.records import Records, from_frames, read_frames
from analysis.inputs.tables import TableOptions
from analysis.inputs.variants import first_variant
from harness.frozen import nearest
from harness.record import SweepManifest


def read(
    paths: Sequence[Path],
    options: TableOptions | None = None,
    baseline: str | None = None,
    targets: Sequence[float] = (),
) -> Records:
    """Read sweeps' folders, several as one sweep, or outside tables (`outside.from_tables`).

    `baseline` and `targets` (nats per token) replace those of the sweeps.

    Raises: ValueError, one line, for what is not there, for folders and tables together, for options of tables beside
    folders, for sweeps that disagree on the baseline, and for what is wrong inside.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        return from_tables(paths, options, baseline, targets)
    if len(folders) < len(paths):
        file = next(path for path in paths if not path.is_dir())
        raise ValueError(f"{folders[0]} is the folder of a sweep and {file} is a table: read one or the other")
    if options not in (None, TableOptions()):
        raise ValueError(f"{folders[0]}: units and --rename are for tables; a sweep's records are in ours")
    return _read_sweeps(folders, baseline, targets)


def _read_sweeps(folders: Sequence[Path], baseline: str | None, targets: Sequence[float]) -> Records:
    sweeps = [read_frames(folder) for folder in folders]
    manifest = _united({folder: manifest for folder, (manifest, *_) in zip(folders, sweeps, strict=True)}, baseline)
    if targets:
        manifest = manifest.model_copy(update={"targets_nats": tuple(targets)})
    frames = sweeps[0][1:] if len(sweeps) == 1 else _each_run_once(sweeps)
    records = from_frames(manifest, *frames)
    names = records.runs["optimizer"].unique().sort().to_list()
    if baseline is not None and first_variant(baseline, records.runs) not in names:
        raise ValueError(f"--baseline {baseline}: no run of that optimizer; {nearest(baseline, names)}")
    return records


def _united(manifests: Mapping[Path, SweepManifest], baseline: str | None) -> SweepManifest:
    first, *others = manifests.values()
    if baseline is None and any(other.baseline != first.baseline for other in others):
        named = ", ".join(f"{manifest.baseline} in {folder}" for folder, manifest in manifests.items())
        raise ValueError(f"the sweeps have several baselines ({named}): name one with --baseline")
    sweeps = (first, *others)
    return SweepManifest(
        name=", ".join(dict.fromkeys(sweep.name for sweep in sweeps)),
        description="; ".join(dict.fromkeys(sweep.description for sweep in sweeps if sweep.description)),
        baseline=baseline or first.baseline,
        targets_nats=tuple(dict.fromkeys(loss for sweep in sweeps for loss in sweep.targets_nats)),
        runs=tuple(run for sweep in sweeps for run in sweep.runs),
        tuned=tuple(dict.fromkeys(setting for sweep in sweeps for setting in sweep.tuned)),
    )


def _each_run_once(
    sweeps: Sequence[tuple[SweepManifest, pl.DataFrame, pl.DataFrame, pl.DataFrame]],
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Unite runs, evaluations and diagnostics; a run of several sweeps is taken from the first in which it finished."""
    runs, rows, measured = (
        pl.concat(frame.with_columns(sweep=pl.lit(number)) for number, frame in enumerate(frames))
        for frames in zip(*(frames for _, *frames in sweeps), strict=True)
    )
    unfinished = (pl.col("status") != "finished").fill_null(value=True)
    runs = runs.sort(unfinished, maintain_order=True).unique("run_id", keep="first", maintain_order=True)
    own = ["run_id", "sweep"]
    return runs, rows.join(runs, on=own, how="semi"), measured.join(runs, on=own, how="semi")

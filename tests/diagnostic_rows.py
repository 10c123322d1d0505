"""Diagnostics planted into the records of a laboratory: noise scales, sharpness, sizes and spectra that are known."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from analysis.inputs.records import Records
from analysis.schemas import DIAGNOSTICS, polars_schema

NOISE_SCALE = {"adamw": 2_000.0, "muon": 3_000.0}
#: AdamW's sharpness over Muon's at every loss, and the share of it from within layers.
RATIO, WITHIN_SHARE = 1.76, 0.3
_MUON_SHARPNESS, _RUN_SPREAD = 0.02, 0.1
_STEPS, _SIGNAL, _SPREAD = 40, 4.0, 0.4
_PERCENTILES = (0, 10, 25, 50, 75, 90, 100)


def with_diagnostics(records: Records) -> Records:
    """Return the records with what every run measured at each of its evaluations but the first."""
    runs = records.runs.select("run_id", "optimizer", "global_batch_tokens")
    marks = records.evaluations.filter(pl.col("step") > 0).join(runs, on="run_id", maintain_order="left")
    rows = [row for mark in marks.iter_rows(named=True) for row in _rows(mark)]
    complete = [dict.fromkeys(DIAGNOSTICS) | row for row in rows]
    frame = pl.DataFrame(complete, schema=polars_schema(DIAGNOSTICS), orient="row")
    return replace(records, diagnostics=frame.sort("run_id", "step", "quantity", "group"))


def _rows(mark: dict[str, Any]) -> Iterator[dict[str, Any]]:
    known = {name: mark[name] for name in ("run_id", "step", "tokens_seen")}
    yield known | _noise_scale(mark)
    of_run = np.random.default_rng(zlib.crc32(mark["run_id"].encode()))
    sharpness = _MUON_SHARPNESS * mark["val_loss_nats"] * float(np.exp(_RUN_SPREAD * of_run.normal()))
    sharpness *= RATIO if mark["optimizer"] == "adamw" else 1.0
    for quantity, value in (("sharpness", sharpness), ("sharpness_within_layers", WITHIN_SHARE * sharpness)):
        yield known | {"quantity": quantity, "group": "all", "value": value}
    for quantity, value in _of_matrices(mark):
        yield known | {"quantity": quantity, "group": "hidden", "value": value}


def _noise_scale(mark: dict[str, Any]) -> dict[str, Any]:
    draw = np.random.default_rng(zlib.crc32(f"{mark['run_id']} {mark['step']}".encode()))
    signal = _SIGNAL * (1 + _SPREAD * draw.normal(size=_STEPS))
    noise = _SIGNAL * NOISE_SCALE[mark["optimizer"]] * (1 + _SPREAD * draw.normal(size=_STEPS))
    batch = mark["global_batch_tokens"]
    return {
        "quantity": "noise_scale_micro_batches",
        "group": "all",
        "value": noise.mean() / signal.mean(),
        "num_steps": _STEPS,
        "small_batch_tokens": batch / 4,
        "big_batch_tokens": float(batch),
        "signal": signal.mean(),
        "noise": noise.mean(),
        "signal_variance": signal.var(ddof=1),
        "noise_variance": noise.var(ddof=1),
        "signal_noise_covariance": np.cov(signal, noise)[0, 1],
    }


def _of_matrices(mark: dict[str, Any]) -> Iterator[tuple[str, float]]:
    rms = 2e-3 * (mark["global_batch_tokens"] / 1024) ** 0.5
    yield "update_rms", rms
    yield "update_spectral_norm", 20 * rms
    slopes = {"update": 0.5 if mark["optimizer"] == "muon" else 2.0, "momentum": 3.0}
    for of, slope in slopes.items():
        for percent in _PERCENTILES:
            yield f"{of}_singular_value_p{percent}", float(np.exp(slope * (percent / 100 - 0.7)))

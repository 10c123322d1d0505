"""Target losses for curves of which nobody said what loss they are to reach."""

import math

import numpy as np
import polars as pl

from analysis.inputs.protocols import WITHOUT_CROSSINGS

_CELL = ("optimizer", "protocol", "global_batch_tokens")

#: Easier targets are where the slowest cell was after these shares of its tokens.
_EARLIER = (0.5, 0.25)


def choose_targets(marks: pl.DataFrame) -> dict[str, tuple[float, ...]]:
    """Return up to three losses a model, the hardest first, in steps of 0.01 nats.

    `marks` has the runs' model, optimizer, protocol, global_batch_tokens and run, with tokens_seen and val_loss_nats,
    by run and tokens. The hardest target is the lowest loss that a run of every cell reached; the others are the loss
    of the slowest cell at one half and one quarter of its tokens. Runs that diverged count for nothing, nor those of
    protocols without crossings or of a single evaluation; a model that is left without runs has no targets.
    """
    finite = pl.col("val_loss_nats").is_finite()
    marks = marks.filter(
        finite.all().over("run"), pl.len().over("run") > 1, ~pl.col("protocol").is_in(WITHOUT_CROSSINGS)
    )
    runs = marks.group_by("model", *_CELL, "run").agg(pl.col("val_loss_nats").min())
    best = runs.sort("val_loss_nats", "run").group_by("model", *_CELL).first()
    slowest = best.sort("val_loss_nats", "run", descending=True).unique("model", keep="first", maintain_order=True)
    return {
        model: _losses(marks.filter(pl.col("run") == run, pl.col("tokens_seen") > 0))
        for model, run in slowest.sort("model").select("model", "run").iter_rows()
    }


def _losses(curve: pl.DataFrame) -> tuple[float, ...]:
    """Return a curve's lowest loss and those before, rounded up; none that its first mark was at already."""
    tokens = np.log(curve["tokens_seen"].to_numpy())
    lowest = np.minimum.accumulate(curve["val_loss_nats"].to_numpy())
    end = tokens[np.argmax(lowest == lowest[-1])]
    losses = [lowest[-1], *(np.interp(end + math.log(share), tokens, lowest) for share in _EARLIER)]
    rounded = (math.ceil(round(float(loss) * 100, 6)) / 100 for loss in losses)
    return tuple(dict.fromkeys(loss for loss in rounded if loss < lowest[0]))

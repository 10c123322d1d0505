"""Groups of runs that are alike but for their seeds: what became of them, and their mean log T with its noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.quantities.learning_rates import SERIES, SETTING
from analysis.statistics.censored import Samples, means
from analysis.statistics.noise import Noise, pooled
from analysis.statistics.resampling import seed_weights

Array = NDArray[np.float64]
Key = tuple[Any, ...]

GROUP = (*SERIES, *SETTING, "stage")

#: The seed of a run, of initial weights and of data; a run that states none has its own.
SEED_NAME = pl.coalesce(pl.format("{}.{}", "init_seed", "data_seed"), pl.format(".{}", "data_seed"), "run_id")

_PER_TOKEN = ("flops_to_target", "train_seconds_to_target")


@dataclass(frozen=True)
class RunGroups:
    """All groups of a table of targets.

    runs: rows of the table with `group`, `log_tokens`, `seed` (of initial weights and of data; a run that states none
    has its own), `value` and `side` (see `censored.Samples`; null for a run that says nothing of T).
    frame: a row per group, with the columns of `summarize_rates` and more; `sample` is its place in `samples`, null for
    a group of which no run gives a T. `log_tokens` is null unless every run gives one, or a lower one than can be said.
    samples, seeds: log T and numbers of seeds [samples, runs], the latter into `seed_names`.
    noise: of each series, None where too few runs are repeated.
    """

    runs: pl.DataFrame
    frame: pl.DataFrame
    samples: Samples
    seeds: NDArray[np.int_]
    seed_names: list[str]
    noise: Mapping[Key, Noise | None]

    def resampled_means(self, sample: Sequence[int], deviation: Array, context: str) -> Array:
        """Return the mean log T of samples with other weights of their seeds [resamples, samples].

        `deviation` [samples] is that of one run; `context` is where seeds of one name are the same seed.
        """
        own, seeds = self.samples.at(np.array(sample, int)), self.seeds[np.array(sample, int)]
        names, code = np.unique(seeds, return_inverse=True)
        code = code.reshape(seeds.shape)
        weights = seed_weights([self.seed_names[name] for name in names], context)
        present, values = np.zeros((2, len(names), len(sample)))
        for table, known in ((present, own.weight), (values, own.weight * own.values)):
            np.add.at(table, (code, np.arange(len(sample))[:, None]), known)
        mean = weights @ values / (weights @ present)
        for place in np.flatnonzero(~own.is_exact):
            weight = own.weight[place] * weights[:, code[place]]
            draws = Samples(*np.broadcast_arrays(own.values[place], own.side[place], weight))
            mean[:, place] = means(draws, np.full(len(weight), deviation[place]))
        return np.asarray(mean, float)


def group_runs(targets: pl.DataFrame) -> RunGroups:
    """Group the runs of `targets` and estimate their noise and, from it, the mean of each group."""
    runs = with_values(targets).sort(*GROUP, "run_id", nulls_last=True)
    runs = runs.with_columns(group=pl.struct(GROUP).rle_id())
    noise = _noise(runs)
    frame = _summary(runs)
    known = runs.join(frame.select("group", "sample"), on="group", how="left", maintain_order="left")
    known = known.filter(pl.col("sample").is_not_null() & pl.col("value").is_not_null())
    samples = Samples.padded(known["sample"], known["value"], known["side"])
    names = known["seed"].unique().sort()
    code = known["seed"].replace_strict(names, range(len(names)), return_dtype=pl.Int64)
    seeds = Samples.padded(known["sample"], code, 0).values.astype(int)
    likely = _likely_means(frame, samples, noise)
    complete = pl.col("num_reached") + pl.col("num_reached_at_first_eval") == pl.col("num_runs")
    frame = frame.join(likely, on="sample", how="left", maintain_order="left").with_columns(
        log_tokens=pl.when(complete).then("likely_log_tokens")
    )
    return RunGroups(runs, frame, samples, seeds, names.to_list(), noise)


def with_values(targets: pl.DataFrame) -> pl.DataFrame:
    """Add `log_tokens`, `seed`, and what is known of log T: `value` with its `side`."""
    sides = {"reached": 0, "not_reached": 1, "reached_at_first_eval": -1}
    return targets.with_columns(
        log_tokens=pl.col("tokens_to_target").log(),
        seed=SEED_NAME,
        value=pl.coalesce("tokens_to_target", "bound_tokens").log(),
        side=pl.col("status").replace_strict(sides, default=None, return_dtype=pl.Int64),
    )


def complete_groups(runs: pl.DataFrame, value: str = "log_tokens", group: Sequence[str] = GROUP) -> pl.DataFrame:
    """Keep the groups, alike but for their seeds, of which every run has a value: survivors spread too little."""
    return runs.filter(pl.col(value).is_not_null().all().over(group))


def _noise(runs: pl.DataFrame) -> dict[Key, Noise | None]:
    """Pool the noise within a series, or over all optimizers of its target where it alone has too few repeated runs.

    The fresh seeds are groups of their own: that the rate was chosen for its mean does not bend the spread around it.
    """
    repeated = runs.filter(pl.col("value").is_not_null()).select(
        *SERIES,
        "group",
        "seed",
        "value",
        "side",
        cell=pl.struct("optimizer", "global_batch_tokens").rank("dense"),
        log_batch=pl.col("global_batch_tokens").log(),
    )
    noise: dict[Key, Noise | None] = dict.fromkeys(runs.select(SERIES).unique(maintain_order=True).iter_rows())
    noise |= {key: pooled(own) for key, own in repeated.group_by(SERIES, maintain_order=True)}
    others = [name for name in SERIES if name != "optimizer"]
    lacking = {key: dict(zip(SERIES, key, strict=True)) for key, own in noise.items() if own is None}
    for key, names in lacking.items():
        noise[key] = pooled(repeated.filter(**{name: names[name] for name in others}))
    return noise


def _summary(runs: pl.DataFrame) -> pl.DataFrame:
    status, reached = pl.col("status"), pl.col("status") == "reached"
    counts = {
        "num_reached": "reached",
        "num_reached_at_first_eval": "reached_at_first_eval",
        "num_diverged": "diverged",
        "num_short": "not_reached",
    }
    return (
        runs.group_by("group", *GROUP, maintain_order=True)
        .agg(
            num_runs=pl.len().cast(pl.Int64),
            num_bounds=(pl.col("value").is_not_null() & ~reached).sum().cast(pl.Int64),
            seeds=pl.col("seed").filter(pl.col("value").is_not_null()),
            warmups_to_target=(pl.col("tokens_to_target") / pl.col("warmup_tokens")).min(),
            **{name: (status == value).sum().cast(pl.Int64) for name, value in counts.items()},
            **{f"{name}_per_token": (pl.col(name) / pl.col("tokens_to_target")).log().mean() for name in _PER_TOKEN},
        )
        .with_columns(sample=pl.when(pl.col("num_reached") > 0).then(1).cum_sum().cast(pl.Int64) - 1)
    )


def _likely_means(frame: pl.DataFrame, samples: Samples, noise: Mapping[Key, Noise | None]) -> pl.DataFrame:
    """Return the mean log T of each sample; null for a sample with bounds where the noise is not known."""
    rows = frame.filter(pl.col("sample").is_not_null())
    known_noise = [noise[key] for key in rows.select(SERIES).iter_rows()]
    log_batch = rows["global_batch_tokens"].log().to_numpy()
    deviation = np.array(
        [own.deviation_at(place) if own else np.nan for own, place in zip(known_noise, log_batch, strict=True)]
    )
    known = samples.is_exact | np.isfinite(deviation)
    mean = np.full(len(known), np.nan)
    mean[known] = means(samples.at(known), deviation[known])
    return rows.select("sample", likely_log_tokens=pl.Series(mean).fill_nan(None))

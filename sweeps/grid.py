"""From a `SweepSpec` to its runs: every combination of the axes, each a whole `RunConfig`.

The order is that of the file: optimizers first, then grid axes (the last one fastest), zip, learning rates. A run that
several combinations lead to is run once.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from harness.config import CorpusConfig, RunConfig
from harness.frozen import nearest
from harness.parametrization import check_head_widths
from sweeps.branch_runs import last_branch_point, with_branches
from sweeps.mistakes import Mistakes
from sweeps.spec import SweepSpec

if TYPE_CHECKING:
    from harness.corpus import Corpus

Combination = dict[str, Any]
Prepare = Callable[[CorpusConfig], "Corpus"]

#: These have their own place in a sweep file: one way to say a thing.
_NOT_IN_BASE = {
    "optimizer": "give each optimizer a section under optimizers",
    "token_budget": "token_budget is a key of the sweep itself (a number, or one for each batch)",
}


def expand(spec: SweepSpec, prepare: Prepare) -> list[RunConfig]:
    """Return the runs of the grid stage, with the fingerprint and vocabulary of their corpora filled in; where the
    sweep has branches, these come after their trunks.

    Raises: ValueError, one line for each mistake, with the combinations that it concerns; no corpus is prepared before
    all runs are valid.
    """
    runs = list(unprepared_runs(spec))
    corpora = {run.corpus.model_dump_json(): run.corpus for run in runs}
    prepared = {key: prepare(corpus) for key, corpus in corpora.items()}
    filled = [with_corpus(run, prepared[run.corpus.model_dump_json()]) for run in runs]
    return with_branches(spec, {run.run_id: run for run in filled}.values())


def unprepared_runs(spec: SweepSpec) -> Iterator[RunConfig]:
    """Yield valid runs, branches left out, whose corpus is not known yet. Raises: ValueError as `expand`."""
    _check_base(spec)
    mistakes, runs, combinations = Mistakes(), [], _kept(spec)
    for combination in combinations:
        try:
            of_one = _runs(spec, combination)
            with_branches(spec, of_one)
            runs += of_one
        except ValueError as error:
            mistakes.add(error, _label(combination))
    mistakes.raise_any(of=len(combinations))
    check_head_widths((run.model.width, run.model.head_width, run.model.parametrization) for run in runs)
    yield from runs


def with_corpus(run: RunConfig, corpus: "Corpus") -> RunConfig:
    """Return the run with its corpus' fingerprint and vocabulary."""
    known = {"fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size}
    return run.model_copy(
        update={
            "corpus": run.corpus.model_copy(update=known),
            "model": run.model.model_copy(update={"vocab_size": corpus.vocab_size}),
        }
    )


def on_fresh_seeds(runs: Iterable[RunConfig], seeds: Iterable[int]) -> list[RunConfig]:
    """Return each distinct run again on every seed (both of initialisation and of data order)."""
    seeds = list(seeds)
    fresh = [run.model_copy(update={"init_seed": seed, "data_seed": seed}) for run in runs for seed in seeds]
    return list({run.run_id: run for run in fresh}.values())


def _check_base(spec: SweepSpec) -> None:
    for key, advice in _NOT_IN_BASE.items():
        if key in spec.base:
            raise ValueError(f"{spec.name}: base.{key} is not a shared setting; {advice}")


def _kept(spec: SweepSpec) -> list[Combination]:
    combinations = list(_combinations(spec))
    if not spec.where:
        return combinations
    axes = {"optimizer", *spec.grid, *spec.zip}
    for number, condition in enumerate(spec.where, start=1):
        for key in condition:
            if key not in axes:
                raise ValueError(
                    f"{spec.name}: where, entry {number}: {key!r} is not an axis of this sweep; {nearest(key, axes)}"
                )
        if not any(_matches(combination, condition) for combination in combinations):
            raise ValueError(f"{spec.name}: where, entry {number} keeps no combination: {condition}")
    return [c for c in combinations if any(_matches(c, condition) for condition in spec.where)]


def _combinations(spec: SweepSpec) -> Iterator[Combination]:
    axes = [[{"optimizer": name} for name in spec.optimizer_axis]]
    axes += [[{key: value} for value in values] for key, values in spec.grid.items() if key != "optimizer"]
    if spec.zip:
        axes.append([dict(zip(spec.zip, row, strict=True)) for row in zip(*spec.zip.values(), strict=True)])
    seen: set[str] = set()
    for parts in itertools.product(*axes):
        merged = {key: value for part in parts for key, value in part.items()}
        combination = {key: value for key, value in merged.items() if _concerns(key, merged["optimizer"])}
        if (key := repr(sorted(combination.items()))) not in seen:
            seen.add(key)
            yield combination


def _concerns(key: str, optimizer: str) -> bool:
    """Tell whether an axis matters: `optimizers.muon.momentum` does for muon alone."""
    return not key.startswith("optimizers.") or key.startswith(f"optimizers.{optimizer}.")


def _matches(combination: Combination, condition: dict[str, Any]) -> bool:
    return all(
        key in combination and combination[key] in (wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in condition.items()
    )


def _label(combination: Combination) -> str:
    return ", ".join(f"{key}={value}" for key, value in combination.items())


def _runs(spec: SweepSpec, combination: Combination) -> list[RunConfig]:
    """Return the runs of one combination: one for each learning rate, which may depend on the batch."""
    settings = _settings(spec, combination)
    rule = spec.optimizers[combination["optimizer"]].learning_rate
    optimizer = settings["optimizer"]
    if rule is None:
        if "peak_lr" not in optimizer:
            raise ValueError(
                f"{spec.name}: optimizers.{optimizer['name']}.learning_rate is missing; "
                "give a list such as [0.01, 0.02], or a centre that moves with the batch"
            )
        return [_checked(spec, settings)]
    if "peak_lr" in optimizer:
        raise ValueError(f"{spec.name}: {optimizer['name']} has both a learning_rate and a peak_lr; keep one of them")
    any_rate = _checked(spec, settings | {"optimizer": optimizer | {"peak_lr": 1.0}})
    return [_with_peak_lr(any_rate, rate) for rate in rule.at(any_rate.global_batch_tokens)]


def _with_peak_lr(run: RunConfig, peak_lr: float) -> RunConfig:
    return run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"peak_lr": peak_lr})})


def _settings(spec: SweepSpec, combination: Combination) -> dict[str, Any]:
    """Return the mapping of one combination, without its learning rate where a rule gives that."""
    name = combination["optimizer"]
    settings = copy.deepcopy(spec.base) | {"optimizer": {"name": name, **copy.deepcopy(spec.optimizers[name].fields)}}
    for key, value in combination.items():
        if key != "optimizer":
            _put(settings, key.replace(f"optimizers.{name}.", "optimizer.", 1), value)
    if "token_budget" not in settings:
        settings["token_budget"] = _token_budget(spec, settings)
    return _with_both_seeds(spec, settings)


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ValueError(f"the axis {key} names no field: {section} has no keys")
    settings[last] = value


def _token_budget(spec: SweepSpec, settings: dict[str, Any]) -> int:
    if isinstance(spec.token_budget, int):
        return spec.token_budget
    if spec.token_budget is None and spec.has_branches:
        return last_branch_point(spec, settings)
    if spec.token_budget is None:
        raise ValueError(f"{spec.name}: token_budget is missing (a number, or one for each batch)")
    batch = settings.get("global_batch_tokens")
    if not isinstance(batch, int | float | str):
        return 1  # no batch: RunConfig says so
    if batch not in spec.token_budget:
        known = ", ".join(map(str, spec.token_budget))
        raise ValueError(f"{spec.name}: token_budget has no entry for the batch of {batch} tokens; it has {known}")
    return spec.token_budget[int(batch)]


def _with_both_seeds(spec: SweepSpec, settings: dict[str, Any]) -> dict[str, Any]:
    if "seed" not in settings:
        return settings
    both = sorted({"init_seed", "data_seed"} & settings.keys())
    if both:
        raise ValueError(f"{spec.name}: seed sets init_seed and data_seed; remove seed or {' and '.join(both)}")
    seed = settings.pop("seed")
    return settings | {"init_seed": seed, "data_seed": seed}


def _checked(spec: SweepSpec, settings: dict[str, Any]) -> RunConfig:
    run = RunConfig.parse(settings, source=spec.name)
    lowest, stop = min(spec.targets_nats), run.stop_at_loss_nats
    if stop is not None and stop > lowest:
        raise ValueError(
            f"{spec.name}: runs stop at {stop:g} nats, before the target of {lowest:g}; lower stop_at_loss_nats"
        )
    if spec.confirm and {run.init_seed, run.data_seed} & set(spec.confirm.seeds):
        used = sorted({run.init_seed, run.data_seed} & set(spec.confirm.seeds))
        raise ValueError(
            f"{spec.name}: confirm.seeds {used} are seeds of the grid already; confirmation needs fresh ones"
        )
    return run

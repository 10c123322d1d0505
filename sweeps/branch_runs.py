"""From the runs of a grid, the trunks, to their branches: the runs that start from a state of a trunk.

A branch is a run like any other, with the trunk in its identity. Its configuration is that of the whole run from token
0, so that it can be compared with runs that were trained by themselves.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from harness.config import RunConfig
from sweeps.spec import SweepSpec

#: Evaluations of a branch at a larger batch, as long as its steps are as many: its loss is a running mean over them.
_EVALUATIONS_OF_A_BRANCH = 8


def with_branches(spec: SweepSpec, trunks: Iterable[RunConfig]) -> list[RunConfig]:
    """Return the trunks, which keep what their branches need, then the branches; the runs as they are without any.

    Raises: ValueError, one line, for a run that no branch can start from.
    """
    trunks = list(trunks)
    if not spec.has_branches:
        return trunks
    branches = [branch for trunk in trunks for branch in branches_of(spec, trunk)]
    points: dict[str, set[int]] = {trunk.run_id: set() for trunk in trunks}
    for branch in branches:
        assert branch.branch is not None
        points[branch.branch.parent].add(branch.branch.at_tokens)
    keeping = [_changed(spec, trunk, keep_at_tokens=sorted(points[trunk.run_id])) for trunk in trunks]
    return [*keeping, *{branch.run_id: branch for branch in branches}.values()]


def branches_of(spec: SweepSpec, trunk: RunConfig) -> Iterator[RunConfig]:
    """Yield the branches of one trunk. Raises: ValueError, one line, where it cannot have them."""
    _check_trunk(spec, trunk)
    if spec.branched_decay:
        for budget in spec.branched_decay.token_budgets:
            yield _decay_branch(spec, trunk, budget)
    if spec.branched_batch:
        for at_tokens in spec.branched_batch.at_tokens:
            for multiple in spec.branched_batch.multiples:
                yield _batch_branch(spec, trunk, at_tokens, multiple)


def last_branch_point(spec: SweepSpec, settings: dict[str, Any]) -> int:
    """Return the tokens after which no branch of a trunk with these settings starts any more; its learning rate and
    seeds may still be open.
    """
    points = list(spec.branched_batch.at_tokens) if spec.branched_batch else []
    if spec.branched_decay:
        known = {key: value for key, value in settings.items() if key != "seed"}
        known |= {"optimizer": {"peak_lr": 1.0, **settings["optimizer"]}}
        longest = RunConfig.parse(known | {"token_budget": max(spec.branched_decay.token_budgets)}, source=spec.name)
        points.append(_decaying(spec, longest).stable_tokens)
    return max(points)


def _check_trunk(spec: SweepSpec, trunk: RunConfig) -> None:
    if trunk.schedule.kind != "constant":
        raise ValueError(
            f"{spec.name}: branches start from runs at a constant rate, and schedule.kind is {trunk.schedule.kind!r}; "
            "set it to constant: the branches bring their own decay"
        )
    if trunk.stop_at_loss_nats is not None:
        raise ValueError(
            f"{spec.name}: with stop_at_loss_nats {trunk.stop_at_loss_nats:g} a trunk may end before its branches "
            "start; remove it"
        )
    if trunk.batch_warmup is not None and spec.branched_batch:
        raise ValueError(
            f"{spec.name}: branched_batch takes multiples of one batch, and batch_warmup gives the trunk several; "
            "remove one of them"
        )


def _decay_branch(spec: SweepSpec, trunk: RunConfig, budget: int) -> RunConfig:
    longer = _changed(spec, trunk, token_budget=budget)
    whole = _decaying(spec, longer)
    _check_reached(spec, trunk, whole.stable_tokens, f"token_budgets {budget}")
    return _changed(spec, whole, branch=_branch(trunk, whole.stable_tokens, "decay"))


def _decaying(spec: SweepSpec, run: RunConfig) -> RunConfig:
    assert spec.branched_decay is not None
    decay = spec.branched_decay
    last_part = {"kind": "wsd", "decay_share": decay.decay_share, "final_fraction": decay.final_fraction}
    schedule = run.schedule.model_dump(mode="json") | last_part
    return _changed(spec, run, schedule=schedule)


def _batch_branch(spec: SweepSpec, trunk: RunConfig, at_tokens: int, multiple: int) -> RunConfig:
    assert spec.branched_batch is not None
    section, batch = spec.branched_batch, trunk.global_batch_tokens
    for key, tokens, step in (("at_tokens", at_tokens, batch), ("tokens", section.tokens, multiple * batch)):
        if tokens % step:
            below = tokens // step * step
            raise ValueError(
                f"{spec.name}: branched_batch.{key} {tokens} is not a whole number of steps of {step} tokens; the "
                f"nearest are {below or step} and {below + step}"
            )
    _check_reached(spec, trunk, at_tokens, f"at_tokens {at_tokens}")
    peak_lr = trunk.optimizer.peak_lr * multiple**section.lr_exponent
    stage = {"until_tokens": at_tokens, "global_batch_tokens": batch}
    return _changed(
        spec,
        trunk,
        global_batch_tokens=multiple * batch,
        token_budget=at_tokens + section.tokens,
        optimizer=trunk.optimizer.model_dump(mode="json") | {"peak_lr": peak_lr},
        batch_warmup={"stages": [stage], "lr_exponent": section.lr_exponent},
        evaluation=trunk.evaluation.model_dump(mode="json")
        | _marks(at_tokens, section.tokens, max(section.multiples) * batch),
        branch=_branch(trunk, at_tokens, "batch"),
    )


def _marks(at_tokens: int, tokens: int, largest_batch_tokens: int) -> dict[str, int]:
    """Return the marks of a branch's evaluations: as many for all batches, at least one step of the largest apart."""
    number = min(max(tokens // largest_batch_tokens, 1), _EVALUATIONS_OF_A_BRANCH)
    octaves = math.log2(1 + tokens / at_tokens)
    return {"first_mark_tokens": at_tokens, "marks_per_doubling": max(math.floor(number / octaves), 1)}


def _branch(trunk: RunConfig, at_tokens: int, kind: Literal["decay", "batch"]) -> dict[str, Any]:
    return {"parent": trunk.run_id, "at_tokens": at_tokens, "kind": kind}


def _check_reached(spec: SweepSpec, trunk: RunConfig, at_tokens: int, of: str) -> None:
    if at_tokens > trunk.realized_tokens:
        raise ValueError(
            f"{spec.name}: the branch of {of} starts at {at_tokens} tokens, and its trunk ends at "
            f"{trunk.realized_tokens}; raise token_budget, or leave it out: then trunks go as far as branches need"
        )


def _changed(spec: SweepSpec, run: RunConfig, **changes: Any) -> RunConfig:
    return RunConfig.parse(run.model_dump(mode="json") | changes, source=spec.name)

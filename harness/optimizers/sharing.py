"""Matrices shared out over the processes of a run: each has an owner, which alone updates it and keeps its state.

A step goes through the shapes one after the other: every process updates its own matrices of a shape, then each owner
sends the others their new weights in one message. Weights are sent rather than updates, so that it serves every rule
that updates each matrix for itself, and processes cannot drift apart.

Sources: KellerJordan/Muon (whole matrices in turn over processes, weights gathered); microsoft/dion; arXiv 2502.16982,
section 2.3 (one share of the momentum on each process).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from harness.optimizers.rule import Group, State
from harness.optimizers.torch_later import Tensor, torch


class _Form(NamedTuple):
    """What a process has to know of a tensor before it gets it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Return a copy on the host, in the order in memory on which the last bits of a product depend."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype).copy_(tensor)


class _Message(NamedTuple):
    """Weights on their way: the work of sending them, where they are, and those of this process that wait for them."""

    work: Any
    places: list[Tensor]
    weights: list[Tensor]


def share_out(costs: Sequence[float], num_processes: int) -> list[int]:
    """Return the owner of each matrix: the costliest first, each to the process that has the least to do so far.

    The busiest process has at most 4/3 of the work that it has in the best of all ways (Graham 1969, theorem 2).
    """
    owners, loads = [0] * len(costs), [0.0] * num_processes
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


class Sharing:
    """Which process has which of the matrices that are shared out; what is not is updated by every process."""

    def __init__(self, costs: Mapping[Tensor, float], rank: int, num_processes: int) -> None:
        self._owners = dict(zip(costs, share_out([*costs.values()], num_processes), strict=True))
        self._rank = rank

    def keeps(self, weight: Tensor) -> bool:
        """Tell whether this process keeps the state of a parameter."""
        return self._owners.get(weight, self._rank) == self._rank

    def step(self, groups: Iterable[Group], update: Callable[[Group], None]) -> None:
        """Update the parameters of all groups, of which this process does its part; leave it with all new weights.

        While the weights of one shape are on their way, the matrices of the next are updated; at last comes what every
        process updates. Against waiting for them, that took .8 to .9 of the time at widths of 64 and 128 on two
        processors, and as long at 256.
        """
        groups, on_their_way = [*groups], list[_Message]()
        for group in groups:
            for alike in _of_one_shape(weight for weight in group["params"] if weight in self._owners):
                _update_part(update, group, [weight for weight in alike if self.keeps(weight)])
                sent = self._send(alike)
                _receive(on_their_way)
                on_their_way = sent
        for group in groups:
            _update_part(update, group, [weight for weight in group["params"] if weight not in self._owners])
        _receive(on_their_way)

    def collect(self, state: State) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield, on the first process and into the memory of its host, what the owners keep of each matrix.

        All processes must run through it: they send one tensor after the other, so that none needs room for many.
        """
        own = {number: _forms(state[weight]) for number, weight in enumerate(self._owners) if weight in state}
        forms: list[dict[int, dict[str, _Form]]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(forms, own)
        for number, (weight, owner) in enumerate(self._owners.items()):
            kept = {}
            for name, form in forms[owner].get(number, {}).items():
                sent = self._sent(weight, state, name, form)
                if self._rank == 0:
                    kept[name] = form.laid_out(sent)
            if kept:
                yield weight, kept

    def _sent(self, weight: Tensor, state: State, name: str, form: _Form) -> Tensor:
        """Return what the owner of a matrix keeps of it under this name."""
        owner = self._owners[weight]
        if owner == self._rank:  # counters of steps lie in the memory of the host, from where GPUs send nothing
            tensor = state[weight][name].to(weight.device).contiguous()
        else:
            tensor = weight.new_empty(form.shape, dtype=form.dtype)
        torch.distributed.broadcast(tensor, owner)
        return tensor

    def _send(self, matrices: list[Tensor]) -> list[_Message]:
        """Send the new weights of matrices of one shape, in one message from each owner."""
        owned: dict[int, list[Tensor]] = defaultdict(list)
        for weight in matrices:
            owned[self._owners[weight]].append(weight)
        messages = []
        for owner, weights in owned.items():
            content = weights[0].new_empty(len(weights), weights[0].numel())
            places = [row.view_as(weight) for row, weight in zip(content, weights, strict=True)]
            if owner == self._rank:
                torch._foreach_copy_(places, weights)
            work = torch.distributed.broadcast(content, owner, async_op=True)
            messages.append(_Message(work, places, [] if owner == self._rank else weights))
        return messages


def _receive(messages: list[_Message]) -> None:
    for work, places, weights in messages:
        work.wait()
        if weights:
            torch._foreach_copy_(weights, places)


def _update_part(update: Callable[[Group], None], group: Group, weights: list[Tensor]) -> None:
    if len(weights) == len(group["params"]):
        update(group)  # itself: a class from elsewhere may keep settings in it
    elif weights:
        update(group | {"params": weights})


def _of_one_shape(matrices: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group matrices that are multiplied and sent together, in an order that is the same on every process."""
    grouped: dict[Any, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        grouped[tuple(sorted(matrix.shape)), matrix.dtype].append(matrix)
    return [*grouped.values()]


def _forms(kept: dict[str, Tensor]) -> dict[str, _Form]:
    return {name: _Form(tuple(tensor.shape), tensor.stride(), tensor.dtype) for name, tensor in kept.items()}

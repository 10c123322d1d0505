"""Groups of layers that are measured together: all, the hidden matrices, and each kind of layer."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from harness.config import ModelConfig
from harness.shapes import Parameter, parameters

#: The tensors of each group, by their places among the parameters.
Groups = Mapping[str, tuple[int, ...]]


def groups_of(model: ModelConfig) -> Groups:
    """Return `all`, `hidden`, then each kind of layer in the order of the module."""
    listed = parameters(model)
    found: dict[str, list[int]] = {"all": [], "hidden": []}
    for place, parameter in enumerate(listed):
        found["all"].append(place)
        if parameter.role == "hidden":
            found["hidden"].append(place)
        found.setdefault(kind_of(parameter), []).append(place)
    return {name: tuple(places) for name, places in found.items()}


def kind_of(parameter: Parameter) -> str:
    """Return `embedding`, `head`, `norm`, or what a hidden matrix is in its block: `attention.query`, `mlp.up`."""
    if parameter.role != "hidden":
        return parameter.role
    return parameter.name.split(".", maxsplit=2)[2].removesuffix(".weight")


def membership(groups: Groups, like: Tensor) -> Tensor:
    """Return a matrix (groups, tensors) of ones and zeros that sums what is measured of each tensor by group."""
    matrix = like.new_zeros(len(groups), len(groups["all"]))
    for row, places in zip(matrix, groups.values(), strict=True):
        row[list(places)] = 1.0
    return matrix


def squares(tensors: Iterable[Tensor]) -> Tensor:
    """Return the squared L2 norm of each tensor, (tensors,), float64."""
    return torch.stack(torch._foreach_norm([*tensors])).double().square()

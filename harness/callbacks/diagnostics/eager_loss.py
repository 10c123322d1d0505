"""The loss as a function of the weights, for derivatives beside those of the training step.

The network's own parameters take no part: their gradients, and whoever listens to these, see nothing of it.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call

from harness.module import LanguageModel, cross_entropy


def eager_loss(module: LanguageModel, weights: Iterable[Tensor], sequences: Tensor) -> Tensor:
    """Return the loss of the network with other weights in place of its parameters; a compiled one runs uncompiled."""
    named = dict(zip(dict(module.network.named_parameters()), weights, strict=True))
    is_compiled = module.network._compiled_call_impl is not None
    eager: Any = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()  # its import takes seconds
    with eager:
        logits = functional_call(module.network, cast(Any, named), (sequences[:, :-1],))
    return cross_entropy(logits, sequences)

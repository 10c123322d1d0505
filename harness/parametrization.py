"""Standard parametrization and muP: how initialisation, learning rate and weight decay change with the width.

w = width / base_width; a model of the base width is the same in both. The powers of w, once for every optimizer that
has some here (w^0 where a cell is empty):

| initialisation, multipliers | embedding | hidden | head, `logits` | head, `rate` | norm |
|---|---|---|---|---|---|
| standard deviation, over the standard one | | | 1/2 | −1/2 | |
| logits | | | −1 | | |
| rate: AdamW, Lion | | −1 | | −1 | |
| rate: LAMB | | −1/2 | | | |
| rate: Muon `spectral`, `original` | | | as AdamW | as AdamW | |
| rate: Muon `match_rms_adamw` | | −1/2 | as AdamW | as AdamW | |
| rate: Scion `spectral` | – | | – | – | – |
| rate: Scion `sign` | 1 | | 1 | | |
| rate: Scion `row_norm` | 1 | | 1 | | – |
| rate: Scion `col_norm` | | −1 | | −1 | – |
| rate: Scion `bias_rms` | | −1 | | −1 | |
| weight decay, `independent` | minus the rate's power; LAMB: as AdamW | | | | |

The standard deviation is 1 for the embedding and 1/√fan_in for matrices in both. Attention scores are divided by the
width of a head under muP, in place of its root, times √(width of a head in the base).

Sources: arXiv 2203.03466, tables 3 (`rate`) and 8 (`logits`; for AdamW the two are equal) and definition 4.1
(attention). arXiv 2310.17813, condition 1: an update of a hidden matrix has a spectral norm of √(out/in), which
`spectral` and, at a fixed ratio of out and in, `original` (KellerJordan/Muon) have at every width, while that of
`match_rms_adamw` (arXiv 2502.16982) grows by √w. Scion's sign and norms divide by the width of the input (arXiv
2502.07529, table 2): right for hidden matrices and a head, too little by w for an embedding, whose input is one token.
LAMB's update is a share of its weights (arXiv 1904.00962), so that it follows their initialisation. arXiv 2505.02222
multiplies Muon's hidden rate by AdamW's 1/w (`muon: adamw_table`), relative to the base width as read here.
Assumption: `mlp_width` and `kv_heads` grow with the width.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from harness.frozen import Frozen
from harness.optimizers.muon import MuonConfig
from harness.optimizers.rule import Assignment, Optimizer, Role

Place = Literal["embedding", "hidden", "head_logits", "head_rate", "norm"]
Powers = dict[Place, float]

_ENTRYWISE: Powers = {"embedding": 0.0, "hidden": -1.0, "head_logits": 0.0, "head_rate": -1.0, "norm": 0.0}
_OVER_THE_INPUT: Powers = {"embedding": 1.0, "hidden": 0.0, "head_logits": 1.0, "head_rate": 0.0}

#: The power of w that multiplies the learning rate, by the rule's label and, for Muon, its scale.
RATE_POWERS: dict[str, Powers] = {
    "adamw": _ENTRYWISE,
    "lion": _ENTRYWISE,
    "lamb": {"embedding": 0.0, "hidden": -0.5, "head_logits": 0.0, "head_rate": 0.0, "norm": 0.0},
    "muon original": {"hidden": 0.0},
    "muon match_rms_adamw": {"hidden": -0.5},
    "muon spectral": {"hidden": 0.0},
    "scion spectral": {"hidden": 0.0},
    "scion sign": _OVER_THE_INPUT | {"norm": 0.0},
    "scion row_norm": _OVER_THE_INPUT,
    "scion col_norm": {"embedding": 0.0, "hidden": -1.0, "head_logits": 0.0, "head_rate": -1.0},
    "scion bias_rms": _ENTRYWISE,
}

_ROLES: tuple[Role, ...] = ("hidden", "embedding", "head", "norm")


class ParametrizationConfig(Frozen):
    """How a model changes with its width.

    `head`: what keeps logits from growing with the width: a division of the logits by w, or of the head's rate.
    `muon`: the rate of its matrices from the spectral norm of its updates, or by AdamW's 1/w as arXiv 2505.02222.
    `weight_decay`: `independent` keeps γλ, what a step takes off the weights (arXiv 2309.14322): λ is divided by the
    multiplier of the rate; `coupled` keeps λ.
    `base_head_width` is to be given where heads change their width; else the base has heads of the same width.
    """

    kind: Literal["standard", "mup"] = "standard"
    base_width: Annotated[int, Field(gt=0)] | None = None
    base_head_width: Annotated[int, Field(gt=0)] | None = None
    head: Literal["logits", "rate"] = "logits"
    muon: Literal["spectral_norm", "adamw_table"] = "spectral_norm"
    weight_decay: Literal["independent", "coupled"] = "independent"

    def check(self, width: int, head_width: int, tied_head: bool) -> None:
        """Raise ValueError, one line, where a model of this width is none of the family of the base."""
        if self.kind == "standard":
            given = sorted(self.model_fields_set - {"kind"})
            if given and self != ParametrizationConfig():
                raise ValueError(f"parametrization.{given[0]} says nothing while parametrization.kind is standard")
            return
        if self.base_width is None:
            raise ValueError("parametrization.kind mup needs base_width: the width at which it equals standard")
        if width % self.base_width:
            raise ValueError(
                f"parametrization.base_width {self.base_width} does not divide the width {width}; "
                "take the smallest width of the sweep as the base, and multiples of it"
            )
        base_head_width = self.base_head_width or head_width
        if self.base_width % base_head_width:
            raise ValueError(
                f"heads {head_width} wide do not fit into the base of width {self.base_width}; let the number of heads "
                "grow with the width, or say how wide the base's are: parametrization.base_head_width"
            )
        if tied_head and self.head == "rate":
            raise ValueError("a tied head has no rate of its own; parametrization.head: logits")

    def check_optimizer(self, optimizer: Optimizer, width: int) -> None:
        """Raise ValueError, one line, for a rule without a line in the table."""
        for role in _ROLES:
            self.scaled(optimizer.assign(role, (width,) if role == "norm" else (width, width)), role, width)

    def scaled(self, assignment: Assignment, role: Role, width: int) -> Assignment:
        """Return a parameter's assignment with the multipliers of this width."""
        if self.kind == "standard":
            return assignment
        power, growth = self._power(assignment, role), self._growth(width)
        decay_power = -power if assignment.rule.algorithm != "lamb" else -_ENTRYWISE[self._place(role)]
        decay = growth**decay_power if self.weight_decay == "independent" else 1.0
        return Assignment(assignment.rule, assignment.lr_multiplier * growth**power, assignment.weight_decay * decay)

    def logit_divisor(self, width: int) -> float:
        return self._growth(width) if self.head == "logits" else 1.0

    def head_deviation_factor(self, width: int) -> float:
        """Return the standard deviation of the head's initial weights over the standard one."""
        return math.pow(self._growth(width), 0.5 if self.head == "logits" else -0.5)

    def attention_scale(self, head_width: int) -> float | None:
        """Return what multiplies the products of queries and keys; None for the standard 1/√head_width."""
        if self.kind == "standard":
            return None
        return math.sqrt(self.base_head_width or head_width) / head_width

    def _growth(self, width: int) -> float:
        return width / self.base_width if self.kind == "mup" and self.base_width else 1.0

    def _power(self, assignment: Assignment, role: Role) -> float:
        rule = assignment.rule
        name = f"muon {rule.scale}" if isinstance(rule, MuonConfig) else rule.label
        powers, place = RATE_POWERS.get(name, {}), self._place(role)
        if place not in powers:
            known = sorted(each for each, own in RATE_POWERS.items() if place in own)
            raise ValueError(
                f"muP has no rule for {name} on {role} parameters; there is one for {', '.join(known)}; "
                "for others take parametrization.kind: standard"
            )
        by_table = isinstance(rule, MuonConfig) and self.muon == "adamw_table"
        return _ENTRYWISE[place] if by_table else powers[place]

    def _place(self, role: Role) -> Place:
        if role == "head":
            return "head_logits" if self.head == "logits" else "head_rate"
        return role


def check_head_widths(models: Iterable[tuple[int, int, ParametrizationConfig]]) -> None:
    """Check that the heads of a sweep's models, (width, width of a head, parametrization), change none unsaid.

    Raises: ValueError, one line.
    """
    seen: dict[ParametrizationConfig, tuple[int, int]] = {}
    for width, head_width, parametrization in models:
        if parametrization.kind == "standard" or parametrization.base_head_width is not None:
            continue
        other_width, other = seen.setdefault(parametrization, (width, head_width))
        if other != head_width:
            raise ValueError(
                f"heads are {other} wide at width {other_width} and {head_width} at width {width}; let the number of "
                "heads grow with the width, or say how wide the base's are: model.parametrization.base_head_width"
            )

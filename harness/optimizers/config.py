"""The optimizers by name. A new one is a file with its settings and rule, and a line here."""

from typing import Annotated, get_args

from pydantic import Field

from harness.optimizers.adamw import AdamWConfig, AuxiliaryConfig
from harness.optimizers.custom import CustomConfig
from harness.optimizers.lamb import LambConfig
from harness.optimizers.lars import LarsConfig
from harness.optimizers.lion import LionConfig
from harness.optimizers.mona import MonaConfig
from harness.optimizers.muon import MuonConfig
from harness.optimizers.muon_plus import MuonPlusConfig
from harness.optimizers.normuon import NorMuonConfig
from harness.optimizers.orscale import OrScaleConfig, OrScaleLMConfig
from harness.optimizers.rates import DecayRate, HalfLife, NonNegative, Positive, UnitInterval, decay_per_step
from harness.optimizers.rule import Optimizer
from harness.optimizers.scion import ScionConfig
from harness.optimizers.sgd import SGDConfig
from harness.optimizers.soap import SoapConfig

__all__ = [
    "OPTIMIZERS",
    "AdamWConfig",
    "AuxiliaryConfig",
    "DecayRate",
    "HalfLife",
    "MuonConfig",
    "NonNegative",
    "OptimizerConfig",
    "Positive",
    "UnitInterval",
    "decay_per_step",
]

OptimizerConfig = Annotated[
    AdamWConfig
    | MuonConfig
    | MuonPlusConfig
    | NorMuonConfig
    | OrScaleConfig
    | OrScaleLMConfig
    | MonaConfig
    | ScionConfig
    | LambConfig
    | LarsConfig
    | SGDConfig
    | LionConfig
    | SoapConfig
    | CustomConfig,
    Field(discriminator="name"),
]

#: Every optimizer, in the order in which they are listed.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    section.model_fields["name"].default: section for section in get_args(get_args(OptimizerConfig)[0])
}

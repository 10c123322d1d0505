"""What a cluster is, to a user of it: a YAML file, `NAME.yaml`, that `--cluster NAME` names.

The user's own folder (`$XDG_CONFIG_HOME/critbatch/clusters`, by default under `~/.config`) goes before the profiles
that come with the package.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from harness.config import Count
from harness.frozen import Frozen, nearest
from harness.optimizers.config import NonNegative, Positive
from harness.user_files import reading
from sweeps.speed import Speed

PACKAGED = Path(__file__).parent

Option = str | int | bool


class ClusterProfile(Frozen):
    """How jobs are asked for on one cluster; `slurm.yaml` beside this module says it key by key.

    `gpus_per_device` is 0 on a cluster of processors. `flops_per_second` is what one device sustains in training; with
    it, or with finished runs to measure it on, a job's time limit is `safety` times what its runs should take, plus
    `startup_minutes` and `signal_seconds`, and at most `max_minutes`.
    """

    name: str
    kind: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    gpus_per_device: Annotated[int, Field(ge=0)] = 0
    devices_per_node: Count | None = None
    cpus_per_device: Count = 1
    memory_gb_per_device: Positive | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    flops_per_second: Positive | None = None
    max_minutes: Count = 24 * 60
    safety: Annotated[float, Field(ge=1.0)] = 2.0
    startup_minutes: NonNegative = 5.0
    signal_seconds: Annotated[int, Field(ge=0, le=65_535)] = 120
    requeue: bool = True
    max_requeues: Annotated[int, Field(ge=0)] = 20
    max_array_size: Count = 1000
    max_running_jobs: Count | None = None
    sbatch: dict[str, Option] = Field(default_factory=dict, examples=["{exclude: node7, exclusive: true}"])
    setup: tuple[str, ...] = Field(default=(), examples=['["module load cuda"]'])
    environment: dict[str, str] = Field(default_factory=dict, examples=["{HF_HOME: /scratch/me}"])
    python: str | None = None

    @model_validator(mode="after")
    def _check_signal(self) -> "ClusterProfile":
        if self.signal_seconds >= self.max_minutes * 60:
            raise ValueError(
                f"signal_seconds {self.signal_seconds} leaves nothing of max_minutes {self.max_minutes} "
                f"({self.max_minutes * 60} s): lower it, or raise max_minutes"
            )
        return self

    def devices_on_a_node(self, devices: int) -> int:
        """Return how many of a run's devices are on each of its nodes, which all have as many.

        Raises: ValueError when that is no whole number of nodes.
        """
        if self.devices_per_node is None or devices <= self.devices_per_node:
            return devices
        if rest := devices % self.devices_per_node:
            below = devices - rest
            raise ValueError(
                f"a run on {devices} devices does not fill whole nodes of {self.name}, which have "
                f"{self.devices_per_node} (devices_per_node); set machine.devices to {below} or "
                f"{below + self.devices_per_node}"
            )
        return self.devices_per_node

    def speed(self, devices: int) -> Speed:
        """Return how fast a run on `devices` devices is, as the profile says."""
        if self.flops_per_second is None:
            return Speed(None, "its profile has no flops_per_second", device=self.name)
        return Speed(self.flops_per_second * devices, "as its profile says", device=self.name)


def read_profile(name: str) -> ClusterProfile:
    """Read the profile of a cluster by its name.

    Raises: ValueError for an unknown name, or with one line for each mistake in the file.
    """
    path = next((folder / f"{name}.yaml" for folder in _folders() if (folder / f"{name}.yaml").is_file()), None)
    if path is None:
        own = user_folder() / f"{name}.yaml"
        raise ValueError(
            f"no cluster {name!r}; {nearest(name, profile_names())} A profile of your own is {own}; "
            f"{PACKAGED / 'slurm.yaml'} says what may be in it"
        )
    return ClusterProfile.parse({"name": name} | _mapping(path), source=str(path))


def profile_names() -> list[str]:
    """Return the names of all clusters that have a profile."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def user_folder() -> Path:
    """Return where a user's own profiles are."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "critbatch" / "clusters"


def _folders() -> tuple[Path, Path]:
    return user_folder(), PACKAGED


def _mapping(path: Path) -> dict[str, Any]:
    with reading(path):
        text = path.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys such as partition and account")
    return content

"""Fixtures shared by tests: one small text corpus and its cache for the whole session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: threads that share two cores only wait for each other

from tests.disk import Disk
from tests.runs import write_text
from tests.slurm_cluster import CLIENT_VARIABLES, SlurmCluster, require_slurm


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk that can be filled or made read-only; a skip where this process may not mount one."""
    mounted = Disk(tmp_path / "disk")
    yield mounted
    mounted.unmount()


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A real Slurm of four virtual nodes. Where there can be none: a skip, or an error if CRITBATCH_REQUIRE_SLURM=1."""
    require_slurm()
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The session's Slurm with this process as its client; given back with all nodes up and no job left."""
    for name in [name for name in os.environ if name.startswith(CLIENT_VARIABLES)]:
        monkeypatch.delenv(name)
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_cluster
    slurm_cluster.restart_killed_nodes()
    slurm_cluster.cancel_all()

"""Profiles of clusters: where they are found, and what a wrong one says."""

from pathlib import Path

import pytest
import yaml

from sweeps.cli import main
from sweeps.clusters.profile import PACKAGED, ClusterProfile, profile_names, read_profile


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder of profiles."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "critbatch" / "clusters"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", [path.stem for path in sorted(PACKAGED.glob("*.yaml"))])
def test_packaged_profile_is_valid_and_named_by_its_file(name: str) -> None:
    assert read_profile(name).name == name


def test_packaged_example_names_every_key_with_its_default() -> None:
    lines = (PACKAGED / "slurm.yaml").read_text().splitlines()
    keys = {line.lstrip("# ").split(":")[0]: line for line in lines if ":" in line}
    for key, field in ClusterProfile.model_fields.items():
        if key not in ("name", "kind"):
            assert key in keys, key
            default = field.get_default(call_default_factory=True)
            if keys[key].startswith("#") and default not in (None, (), {}):
                said = keys[key].split(":", 1)[1].split("#")[0].strip()
                assert yaml.safe_load(said) == default, key


def test_own_profile_goes_before_the_packaged_one(own: Path) -> None:
    (own / "slurm.yaml").write_text("partition: mine\n")
    (own / "other.yaml").write_text("partition: long\nsetup: [module load cuda]\n")
    assert read_profile("slurm").partition == "mine"
    assert read_profile("other").setup == ("module load cuda",)
    assert set(profile_names()) == {"local", "other", "slurm", "slurm-gpu"}


def test_own_profile_is_found_under_home_without_the_variable(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(own))
    home = own / ".config" / "critbatch" / "clusters"
    home.mkdir(parents=True)
    (home / "mine.yaml").write_text("partition: here\n")
    assert read_profile("mine").partition == "here"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("partitoin: long", r"bad\.yaml: 'partitoin' is not a key of the top level; did you mean 'partition'\?"),
        ("max_minutes: 0", r"bad\.yaml: max_minutes: expected a number above 0, not 0"),
        ("setup: module load cuda", r'bad\.yaml: setup: expected a list, .* for example setup: \["module load cuda"\]'),
        ("safety: 0.5", r"bad\.yaml: safety: expected a number of at least 1, not 0\.5"),
        ("max_minutes: 2", r"signal_seconds 120 leaves nothing of max_minutes 2 \(120 s\): lower it"),
        ("- partition", r"bad\.yaml: expected a mapping of keys"),
        ("partition: [", r"bad\.yaml, line 1: .*expected"),
    ],
)
def test_wrong_profile_is_refused_with_its_file_and_key(own: Path, content: str, said: str) -> None:
    (own / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_profile("bad")


def test_unknown_cluster_names_the_nearest_and_where_a_profile_goes(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "quickstart", "--cluster", "slrum"]) == 2
    said = capsys.readouterr().err
    assert "no cluster 'slrum'; did you mean 'slurm'?" in said
    assert str(own / "slrum.yaml") in said


def test_cluster_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["submit", "quickstart"])
    assert "--cluster" in capsys.readouterr().err

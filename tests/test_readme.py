"""What the README tells a reader to type works."""

import re
import shlex
from pathlib import Path

import pytest

from sweeps.cli import main
from tests.runs import write_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_sweep_of_the_readme_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, _ = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRITBATCH_CACHE", str(tmp_path / "cache"))
    write_text(tmp_path / "texts", files=5000)
    (tmp_path / "mine.yaml").write_text(sweep)
    assert main(["plan", "mine.yaml"]) == 0
    (printed,) = re.findall(r"critbatch run mine.yaml (--set .*)", README)
    assert main(["plan", "mine.yaml", *shlex.split(printed)]) == 0
    shown = capsys.readouterr().out
    assert "mine" in shown
    assert "48" in shown  # two optimizers, four batches, three rates, two seeds


def test_links_and_pictures_of_the_documents_are_there() -> None:
    for document in (ROOT / "README.md", ROOT / "results" / "README.md", ROOT / "results" / "LOG.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"

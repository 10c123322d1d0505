"""The worked examples of analysis/README.md: each command there gives the answer that lies beside it."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from sweeps.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "analysis" / "README.md").read_text()
COMMANDS = {
    shlex.split(line)[1]: shlex.split(line)[1:]
    for line in re.findall(r"(?m)^critbatch (?:fit|compare|frontier) .*--json$", DOCUMENT)
}


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """Return every plain value inside `value` by the path to it."""
    if isinstance(value, dict):
        return {key: leaf for name in value for key, leaf in leaves(value[name], f"{place}.{name}").items()}
    if isinstance(value, list):
        return {key: leaf for i, each in enumerate(value) for key, leaf in leaves(each, f"{place}[{i}]").items()}
    return {place: value}


@pytest.mark.parametrize("verb", ["fit", "compare", "frontier"])
def test_command_gives_the_answer_in_the_documents(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(COMMANDS[verb]) == 0
    found = leaves(json.loads(capsys.readouterr().out))
    expected = leaves(json.loads((ROOT / "analysis" / "examples" / f"{verb}.json").read_text()))
    assert found.keys() == expected.keys()
    numbers = {place for place, value in expected.items() if isinstance(value, float)}
    assert {place: found[place] for place in numbers} == pytest.approx({place: expected[place] for place in numbers})
    others = expected.keys() - numbers
    assert {place: found[place] for place in others} == {place: expected[place] for place in others}

"""What cannot be answered is said, with its reason, in the JSON and in text."""

import json
from pathlib import Path
from typing import Any

import pytest

from sweeps.cli import main

HEADER = "optimizer,global_batch_tokens,seed,protocol,status,target_loss_nats,tokens_to_target\n"


def table(
    folder: Path, *, unit: int = 1, protocols: tuple[str, str] = ("unstated", "unstated"), status: str = "reached"
) -> str:
    """Write tokens to a target of two optimizers; `unit` divides the batches of the second."""
    rows = HEADER
    for name, protocol, divisor in (("adamw", protocols[0], 1), ("muon", protocols[1], unit)):
        for batch in (512 * 4**power for power in range(5)):
            for seed in (0, 1, 2):
                tokens = 1e6 * (1 + batch / 8000) * (1 + 0.02 * ((seed * 7 + batch // 512) % 5))
                rows += f"{name},{batch // divisor},{seed},{protocol},{status},3.0,{tokens}\n"
    path = folder / "table.csv"
    path.write_text(rows)
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    reasons = {row["what"]: row["reason"] for row in found["refused"]}
    assert len(reasons) == len(found["refused"])
    return reasons


def text(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return " ".join(capsys.readouterr().out.split())


def test_optimizers_whose_batches_are_in_two_units_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path, unit=512)
    reasons = refused(capsys, "fit", path)
    words = "AdamW and Muon share no batch: 512–128K and 1–256 (is one of them in another unit?)"
    assert {reasons[what] for what in ("token_ratio", "ratio_trend", "ratio_decomposition")} == {words}
    assert f"refused token_ratio, ratio_trend and ratio_decomposition: {words}" in text(capsys, "fit", path)
    assert main(["fit", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_ratio"] == found["ratio_trend"] == found["ratio_decomposition"] == []


def test_optimizers_of_two_protocols_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path, protocols=("constant_ema", "mid_schedule"))
    words = "adamw and muon share no protocol: constant_ema and mid_schedule"
    assert refused(capsys, "fit", path)["token_ratio"] == words
    assert f"refused token_ratio: {words}" in text(capsys, "fit", path)


@pytest.mark.parametrize(
    ("verb", "what"), [("fit", "tokens_to_target"), ("compare", "final_loss"), ("frontier", "frontier")]
)
def test_table_in_which_every_run_diverged_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, what: str
) -> None:
    path = table(tmp_path, status="diverged")
    assert refused(capsys, verb, path)[what] == "all 30 runs diverged"
    assert f"refused {what}: all 30 runs diverged" in text(capsys, verb, path)


def test_questions_that_a_table_of_targets_cannot_answer_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path)
    assert "a table of targets has no loss at the end" in refused(capsys, "compare", path)["final_loss"]
    assert "a table of targets has no loss at the end" in text(capsys, "compare", path)
    assert "has no seconds" in refused(capsys, "frontier", path)["frontier"]
    assert "has no seconds" in text(capsys, "frontier", path)


def test_definition_without_its_input_is_refused_once_and_in_text_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path)
    assert "reference batch" in refused(capsys, "fit", path)["critical_batch overhead_20pct"]
    assert refused(capsys, "fit", path).keys() >= {"critical_batch branched", "critical_batch noise_scale"}
    assert "noise_scale" not in text(capsys, "fit", path)
    asked = text(capsys, "fit", path, "--definition", "noise_scale,token_optimal")
    assert "refused critical_batch noise_scale: needs gradient norms" in asked
    assert "emin_over_smin" not in asked


def test_text_has_the_trend_and_the_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(table(tmp_path))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{lines[0]},lr", *(f"{line},0.1" for line in lines[1:])]))
    said = text(capsys, "fit", str(path))
    assert "largest fall of log ratio" in said
    assert "unresolved" in said
    assert "column lr looks like peak_lr: --rename lr=peak_lr" in said


def test_target_that_a_table_does_not_have_is_named_with_those_that_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", table(tmp_path), "--target-loss", "2"]) == 2
    assert "no run has a target loss of 2.0 nats: the table has the target 3.0" in capsys.readouterr().err


def test_unknown_definition_is_a_usage_error_that_lists_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", table(tmp_path), "--definition", "token_optimal,knee"])
    assert "'knee' is none of emin_over_smin" in capsys.readouterr().err

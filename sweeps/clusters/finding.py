"""What `critbatch doctor` finds."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do about it (empty where it is good)."""

    what: str
    verdict: Verdict
    seen: str
    advice: str = ""

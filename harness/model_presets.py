"""Model shapes by name: all parameters with a vocabulary of 128 (115k), 256 (to 19m) or 50,304 tokens, rounded."""

from typing import Any

MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "115k": {"width": 64, "layers": 2, "heads": 2, "sequence_length": 64, "norm": "layernorm"},
    "0.8m": {"width": 128, "layers": 4, "heads": 4, "sequence_length": 128, "norm": "layernorm"},
    "5m": {"width": 256, "layers": 6, "heads": 4, "sequence_length": 256},
    "19m": {"width": 512, "layers": 6, "heads": 8, "sequence_length": 512},
    "124m": {"width": 768, "layers": 12, "heads": 12, "sequence_length": 1024},
    "354m": {"width": 1024, "layers": 24, "heads": 16, "sequence_length": 1024},
    "1b": {"width": 2048, "layers": 20, "heads": 16, "sequence_length": 2048},
}

"""The three kinds of outside table, their columns and what is known of them; the documentation is made from these.

A file is of one kind, known by its columns: `val_loss_nats` along `tokens_seen` (curves), `final_loss_nats` (finals) or
`target_loss_nats` with what it took (targets). Every column may hold blanks but those of `REQUIRED`.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from analysis.inputs.protocols import PROTOCOLS
from harness.record import RUN_COLUMNS, Column
from harness.user_files import one_line

Kind = Literal["curves", "finals", "targets"]

_RUN = {
    "optimizer": Column(str, "", "name of the optimizer"),
    "global_batch_tokens": RUN_COLUMNS["global_batch_tokens"],
}
_OPTIONAL = {
    "model": Column(str, "", "name of the model; `unnamed` without it"),
    "num_params_nonembedding": RUN_COLUMNS["num_params_nonembedding"],
    "seed": Column(int, "", "seed of initial weights and data; runs that share it are compared in pairs"),
    "peak_lr": RUN_COLUMNS["peak_lr"],
    "token_budget": Column(int, "tokens", "tokens that the run was planned for; without it, where the run ends"),
    "run_id": Column(str, "", "name of the run; without it, the settings of a run tell it apart"),
    "train_seconds": Column(float, "s", "time inside optimizer steps, evaluation and compilation left out"),
    "num_devices": RUN_COLUMNS["num_devices"],
    "warmup_tokens": Column(int, "tokens", "tokens of the learning rate's warmup"),
    "protocol": Column(str, "", f"{', '.join(PROTOCOLS)}; `unstated` without it"),
}

CURVES_TABLE: dict[str, Column] = {
    **_RUN,
    "tokens_seen": Column(int, "tokens", "training tokens so far; 0 is the untrained model"),
    "val_loss_nats": Column(
        float, "nats/token", "loss that the protocol reads; blank: not evaluated, NaN or infinite: the run diverged"
    ),
    **_OPTIONAL,
}

FINALS_TABLE: dict[str, Column] = {
    **_RUN,
    "token_budget": Column(int, "tokens", "training tokens of the run"),
    "final_loss_nats": Column(
        float, "nats/token", "loss at the end; blank: the run counts for nothing, NaN or infinite: it diverged"
    ),
    **{name: column for name, column in _OPTIONAL.items() if name != "token_budget"},
}

TARGETS_TABLE: dict[str, Column] = {
    **_RUN,
    "target_loss_nats": Column(float, "nats/token", "validation loss to be reached"),
    "steps_to_target": Column(float, "steps", "optimizer steps until the loss was reached; this or tokens_to_target"),
    "tokens_to_target": Column(float, "tokens", "training tokens until the loss was reached"),
    "status": Column(
        str, "", "reached, not_reached (the tokens are where the run ended) or diverged; `reached` without it"
    ),
    **{name: column for name, column in _OPTIONAL.items() if name != "token_budget"},
    "train_seconds": Column(float, "s", "time inside optimizer steps until the loss was reached"),
}

TABLE_SCHEMAS: dict[Kind, dict[str, Column]] = {
    "curves": CURVES_TABLE,
    "finals": FINALS_TABLE,
    "targets": TARGETS_TABLE,
}

#: Columns that a kind cannot be without; a table of targets has one of `TO_TARGET` beside them.
REQUIRED: dict[Kind, tuple[str, ...]] = {
    "curves": ("optimizer", "global_batch_tokens", "tokens_seen", "val_loss_nats"),
    "finals": ("optimizer", "global_batch_tokens", "token_budget", "final_loss_nats"),
    "targets": ("optimizer", "global_batch_tokens", "target_loss_nats"),
}
TO_TARGET = ("steps_to_target", "tokens_to_target")

#: Columns that only one kind has, which is how a file's kind is known.
_TELLTALES: dict[str, Kind] = {
    "tokens_seen": "curves",
    "val_loss_nats": "curves",
    "final_loss_nats": "finals",
    "target_loss_nats": "targets",
    "steps_to_target": "targets",
    "tokens_to_target": "targets",
}

STATUSES = ("reached", "not_reached", "diverged")

#: Units of columns: a batch, a number of training tokens, a loss. `TableOptions` says in what a file gives them.
BATCHES = ("global_batch_tokens",)
TOKENS = ("tokens_seen", "token_budget", "warmup_tokens", "tokens_to_target")
LOSSES = ("val_loss_nats", "final_loss_nats", "target_loss_nats")

#: Numbers that may be zero; seeds may be anything, all others are above zero.
MAY_BE_ZERO = ("tokens_seen", "warmup_tokens", "train_seconds")

#: Losses that say with NaN or infinity that a run diverged.
MAY_DIVERGE = ("val_loss_nats", "final_loss_nats")

#: A second column for a quantity of ours, in another unit: which of the two counts cannot be known.
OTHER_UNITS = {
    "global_batch_tokens": ("global_batch_sequences",),
    "tokens_seen": ("sequences_seen", "steps_seen"),
    "token_budget": ("sequence_budget", "step_budget"),
    **{name: (name.replace("_nats", "_bits"),) for name in LOSSES},
}

#: What other programs call our columns, for advice alone: no column is taken for another without being renamed.
_THEIR_NAMES = {
    "optimizer": ("optim", "opt", "optimizer.name", "optimizer_name"),
    "global_batch_tokens": ("batch_size", "global_batch_size", "batch", "bs", "train/batch_size"),
    "tokens_seen": ("tokens", "train/tokens", "num_tokens", "step", "Step", "_step", "iteration"),
    "val_loss_nats": ("val/loss", "eval/loss", "val_loss", "eval_loss", "validation_loss", "loss"),
    "final_loss_nats": ("final_loss", "val/loss", "val_loss", "eval/loss", "loss"),
    "token_budget": ("tokens", "total_tokens", "max_tokens", "budget"),
    "target_loss_nats": ("target_loss", "target", "loss"),
    "peak_lr": ("lr", "learning_rate", "max_lr", "base_lr", "optimizer.lr"),
    "seed": ("random_seed", "init_seed", "data_seed", "rng_seed"),
}

#: Columns that a table may lack, and of which a note says so where another column has one of their usual names.
_WORTH_A_NOTE = ("peak_lr", "seed", "token_budget")


def recognise(columns: Iterable[str]) -> Kind:
    """Return the kind of table that has these columns.

    Raises: ValueError when they are of two kinds or of none, or when one is missing, with the nearest name there is.
    """
    columns = list(columns)
    _refuse_wide(columns)
    found = {name: _TELLTALES[name] for name in columns if name in _TELLTALES}
    if not found:
        raise ValueError(
            f"no column {_or(['val_loss_nats', 'final_loss_nats', 'target_loss_nats'])}, so this is no table of "
            f"curves, finals or targets; {_advice('val_loss_nats', columns)}"
        )
    kinds = sorted(set(found.values()))
    if len(kinds) > 1:
        named = ", ".join(f"{name!r} ({kind})" for name, kind in found.items())
        raise ValueError(f"columns of {len(kinds)} kinds of table: {named}; a file has one kind: drop the others")
    kind = found[next(iter(found))]
    for name in REQUIRED[kind]:
        if name not in columns:
            raise ValueError(f"column {name!r} of a table of {kind} is missing; {_advice(name, columns)}")
    if kind == "targets" and not set(TO_TARGET) & set(columns):
        raise ValueError(f"column {_or(TO_TARGET)} of a table of targets is missing; {_advice(TO_TARGET[0], columns)}")
    return kind


def alike(others: Sequence[str], lacking: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield ours and theirs: each column that a table lacks, and the further one that has a usual name of it."""
    for ours in _WORTH_A_NOTE:
        theirs = next((name for name in _THEIR_NAMES[ours] if name in others), None)
        if ours in lacking and theirs is not None:
            yield ours, theirs


def _refuse_wide(columns: Sequence[str]) -> None:
    """Refuse a chart of Weights & Biases: a column a run, whose settings are nowhere in the file."""
    wide = [name for name in columns if " - " in name and not name.endswith(("__MIN", "__MAX"))]
    if wide and any(f"{name}__MIN" in columns for name in wide):
        raise ValueError(
            f"a chart exported from Weights & Biases: a column a run ({wide[0]!r}), without its settings; export the "
            "history in long form, a row an evaluation with the run's optimizer, batch and rate (analysis/README.md)"
        )


def _advice(name: str, columns: list[str]) -> str:
    """Return what the column that is missing may be called in the file, or what else the file has."""
    free = [column for column in columns if column not in _TELLTALES and column not in _RUN]
    known = [theirs for theirs in _THEIR_NAMES.get(name, ()) if theirs in free]
    near = known or difflib.get_close_matches(name, free, n=1)
    if near:
        return f"did you mean {near[0]!r}? Then: --rename {near[0]}={name}"
    return f"the file has {one_line(', '.join(columns))}"


def _or(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))

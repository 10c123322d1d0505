"""The loop of all adaptive commands: train what is listed, read the records, ask what would tell most, list that.

All that a round decides is a function of the records on disk: a command that was killed goes on where it was, and runs
that the plain sweep has finished are used.
"""

from collections.abc import Callable, Sequence

from sweeps.added import Proposal
from sweeps.printing import counted
from sweeps.store import SweepFolder, add_round, is_missing

#: What would tell most, given the records; nothing when there is no more to do.
Propose = Callable[[], Sequence[Proposal]]


def run_rounds(
    folder: SweepFolder, command: str, axes: Sequence[str], propose: Propose, train: Callable[[], None]
) -> None:
    """Train and propose in turn until nothing is proposed; `train` trains what the sweep lists and lacks.

    Raises: ValueError when a run failed: what is proposed next would depend on whether it is tried again.
    """
    spec = folder.read_spec()
    while True:
        train()
        _check_complete(folder)
        proposals = propose()
        if not proposals:
            return
        add_round(spec, command, axes, proposals, folder)
        print(f"{counted(len(proposals), 'run')} more:", flush=True)
        for line in in_words(proposals):
            print(line, flush=True)


def in_words(proposals: Sequence[Proposal]) -> list[str]:
    """Say which runs are proposed and why: a line for the runs of a cell that have one reason."""
    alike: dict[tuple[str, int, str], list[Proposal]] = {}
    for each in proposals:
        alike.setdefault((each.run.optimizer.name, each.run.global_batch_tokens, each.why), []).append(each)
    lines = []
    for (optimizer, batch, why), own in alike.items():
        rates = ", ".join(f"{rate:.4g}" for rate in sorted({each.run.optimizer.peak_lr for each in own}))
        seeds = ", ".join(map(str, sorted({each.run.init_seed for each in own})))
        lines.append(f"  {optimizer}, batch {batch:,}: rate {rates} on seed {seeds} ({why})")
    return lines


def _check_complete(folder: SweepFolder) -> None:
    listed = [run.run_id for run in folder.read_manifest().runs if run.stage == "grid"]
    missing = [run_id for run_id in listed if is_missing(folder.run(run_id))]
    if missing:
        raise ValueError(
            f"{counted(len(missing), 'run')} of {len(listed)} have no result, the first is {missing[0]}; "
            f"see why with critbatch status {folder.path}, then start again: what is finished is kept"
        )

"""Loss at equal tokens: each optimizer's final losses against batch, and the gaps between them."""

import math

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import contents, marks
from analysis.page import figure_style as style
from analysis.page.contents import Drawing


def equal_budget(estimates: Estimates) -> Drawing:
    """Draw validation loss against batch at equal tokens, a panel per token budget, a line per optimizer."""
    budgets = _budgets(estimates.equal_budget, "tokens", "optimizer")
    if not budgets:
        return _no_budget(estimates)
    drawn = estimates.equal_budget.filter(pl.col("tokens").is_in(budgets))
    with style.theme():
        optimizers = contents.optimizers(estimates)
        figure, axes = style.panels(len(budgets), height_inches=optimizers.panel_height_inches)
        for ax, budget in zip(axes, budgets, strict=True):
            part = drawn.filter(pl.col("tokens") == budget)
            for name in optimizers.names:
                own = part.filter(pl.col("optimizer") == name).sort("global_batch_tokens")
                look = {"color": optimizers.colour(name), "ls": optimizers.line_style(name), "lw": 0.9}
                ax.plot(own["global_batch_tokens"] * optimizers.dodge(name), own["val_loss_nats"], **look)
                marks.points(ax, own, "val_loss_nats", optimizers, name)
            on_the_way = "" if (part["mark"] == "final").all() else ", an intermediate mark"
            style.heading(ax, f"after {fmt.tokens(budget)} tokens{on_the_way}")
            style.batch_axis(ax, contents.values(drawn, "global_batch_tokens"))
        style.y_label(axes, "Validation loss (nats/token)")
        cues = contents.occurring((contents.interval_cue(estimates), contents.any_interval(drawn, "val_loss_nats")))
        style.side_legend(figure, [*optimizers.handles(contents.values(drawn, "optimizer")), *cues])
    return figure


def gaps(estimates: Estimates) -> Drawing:
    """Draw the baseline's final loss less each challenger's against batch, a panel per token budget."""
    known = estimates.gaps.filter(pl.col("gap_nats").is_not_null())
    budgets = _budgets(known, "token_budget", "challenger")
    if not budgets:
        return "No gaps of final loss: the baseline and no other optimizer ended at the same batch and token budget."
    drawn = known.filter(pl.col("token_budget").is_in(budgets))
    with style.theme():
        optimizers = contents.optimizers(estimates)
        figure, axes = style.panels(len(budgets), height_inches=optimizers.panel_height_inches)
        for ax, budget in zip(axes, budgets, strict=True):
            ax.axhline(0.0, color=style.INK, lw=0.8, zorder=1)
            for name in optimizers.names:
                own = (pl.col("token_budget") == budget) & (pl.col("challenger") == name)
                marks.points(ax, drawn.filter(own), "gap_nats", optimizers, name)
            style.heading(ax, f"after {fmt.tokens(budget)} tokens")
            style.batch_axis(ax, contents.values(drawn, "global_batch_tokens"))
        baseline = fmt.optimizer_name(drawn["baseline"][0])
        style.y_label(axes, f"Final loss of {baseline} less\nthat of the other (nats/token)")
        cues = contents.occurring(
            (style.cue("equal loss", ls="-", lw=0.8), True),
            (contents.interval_cue(estimates), contents.any_interval(drawn, "gap_nats")),
            (contents.caveat_cue(), contents.any_caveat(drawn)),
        )
        handles = style.without_lines(optimizers.handles(contents.values(drawn, "challenger")))
        style.side_legend(figure, [*handles, *cues])
    return figure


def _budgets(frame: pl.DataFrame, tokens: str, optimizer: str) -> list[int]:
    """Return the smallest, the middle and the largest of the token marks that the most cells share.

    Of marks less than a factor of two apart the last one counts: two panels would show the same.
    """
    shared = frame.group_by(tokens).agg(num=pl.struct(optimizer, "global_batch_tokens").n_unique())
    most = sorted(shared.filter(pl.col("num") == pl.col("num").max())[tokens])
    apart = [mark for mark, after in zip(most, [*most[1:], math.inf], strict=False) if after >= 2 * mark]
    return sorted({apart[0], apart[len(apart) // 2], apart[-1]}) if apart else []


def _no_budget(estimates: Estimates) -> str:
    warmup = max(estimates.records.runs["warmup_tokens"].drop_nulls(), default=0)
    beyond = f" beyond the largest warmup ({fmt.tokens(warmup)} tokens)" if warmup else ""
    return f"No token mark{beyond} that the runs at the chosen learning rates all reached."

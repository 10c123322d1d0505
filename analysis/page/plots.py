"""Every figure of the report, in the order of reading: estimates of one model and protocol in, a figure out.

Nothing is fitted here. What is missing is said in words, in its panel or instead of the figure. Legends list what is
drawn, and nothing else.
"""

from collections.abc import Callable, Mapping

from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.estimate import Estimates
from analysis.page import (
    branching_figure,
    budget_figures,
    coverage_figure,
    curves_figure,
    forest_figures,
    frontier_figures,
    headline_figure,
    laws_figure,
    noise_figure,
    rates_figures,
    ratio_figures,
    sharpness_figure,
    tokens_figures,
    updates_figures,
)
from analysis.page.contents import Drawing

BIASED = "mid_schedule"
_TAG = "Biased: read while the rate decays"

#: Every figure by the name of its files.
FIGURES: Mapping[str, Callable[[Estimates], Drawing]] = {
    "headline": headline_figure.headline,
    "standings": forest_figures.standings,
    "coverage": coverage_figure.coverage,
    "loss_curves": curves_figure.loss_curves,
    "learning_rates": rates_figures.learning_rates,
    "tokens_to_target": tokens_figures.tokens_to_target,
    "steps_to_target": tokens_figures.steps_to_target,
    "critical_batches": forest_figures.critical_batches,
    "branched_batches": branching_figure.branched_batches,
    "laws": laws_figure.laws,
    "token_ratios": ratio_figures.token_ratios,
    "token_ratio_by_target": ratio_figures.token_ratio_by_target,
    "ratio_decomposition": forest_figures.ratio_decomposition,
    "rate_rules": ratio_figures.rate_rules,
    "frontier_device_seconds": frontier_figures.device_seconds,
    "frontier_flops": frontier_figures.flops,
    "frontier_devices": frontier_figures.devices,
    "equal_budget": budget_figures.equal_budget,
    "gaps": budget_figures.gaps,
    "noise_scales": noise_figure.noise_scales,
    "sharpness": sharpness_figure.sharpness,
    "update_norms": updates_figures.update_norms,
    "spectra": updates_figures.spectra,
}


def draw(name: str, estimates: Estimates, protocol: str) -> Drawing:
    """Draw a figure of FIGURES; every panel of one that was read mid-schedule says so above its title."""
    drawing = FIGURES[name](estimates)
    if protocol == BIASED and isinstance(drawing, Figure):
        _tag(drawing)
    return drawing


def _tag(figure: Figure) -> None:
    for ax in figure.axes:
        title = ax.get_title(loc="left")
        for text in ax.findobj(Text, include_self=False):
            if title and isinstance(text, Text) and text.get_text() == title:
                text.set_text(f"{_TAG}\n{title}")

"""What `critbatch fit`, `compare` and `frontier` print with --json, as models.

`critbatch schema` prints them as JSON Schema; every key keeps its name, unit and meaning within a `schema_version`. A
number that is not identified is null beside its verdict; an interval is [low, high], of which an end is null where the
data do not bound it.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from analysis.verdicts import GRAVEST_FIRST

Interval = tuple[float | None, float | None]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Judged(_Strict):
    """What every estimate carries beside its number."""

    interval: Interval = Field(description="ends at `level`; null where the data do not bound the number")
    level: float
    verdict: str = Field(description=f"ok, a conclusion, or the gravest of: {', '.join(GRAVEST_FIRST)}")
    reasons: list[str] = Field(description="all verdicts that apply, the gravest first")
    explanation: str = Field(description="the reasons in words")


class _OfSeries(_Strict):
    model: str
    optimizer: str
    protocol: str
    target_loss_nats: float


class _OfPair(_Strict):
    model: str
    baseline: str
    challenger: str
    protocol: str


class TokensToTarget(_OfSeries, _Judged):
    """T_L(B) of one cell."""

    global_batch_tokens: int
    tokens_to_target: float | None
    steps_to_target: float | None
    n: int = Field(description="runs at the chosen rate")
    n_censored: int = Field(description="how many of them give a bound of T alone")
    status: str = Field(description="reached, censored, not_reached, reached_at_first_eval, diverged or refused")
    learning_rate: float | None


class CriticalBatch(_Judged):
    """A critical batch size by one definition; `branched` has no target loss, but a point of training."""

    model: str
    optimizer: str
    protocol: str
    target_loss_nats: float | None
    definition: str
    branch_tokens: int | None = Field(description="of `branched`: tokens of training at which the branches start")
    critical_batch_tokens: float | None
    residuals: str = Field(description="what least squares compares: log, raw_tokens or raw_steps; with the loss")
    parameters: dict[str, float | None]
    parameter_intervals: dict[str, Interval] = Field(description="of each parameter, at `level`")
    num_batches: int
    lack_of_fit_p: float | None
    rms_residual: float | None
    aicc: float | None


class TokenRatio(_OfPair, _Judged):
    """Tokens of the baseline over tokens of the challenger, at one batch and target."""

    target_loss_nats: float
    global_batch_tokens: int
    ratio: float | None
    tokens_saved: float | None
    tokens_saved_interval: Interval
    num_pairs: int


class RatioTrend(_OfPair, _Judged):
    """d log R / d log B; the verdict is rising, falling, unresolved, or what forbids to say."""

    target_loss_nats: float
    slope: float | None
    largest_drop: float | None = Field(description="largest fall of log R from a batch to a larger one")
    largest_drop_interval: Interval = Field(description="simultaneous over all pairs of batches")


class RatioPart(_OfPair, _Judged):
    """One quantity of the decomposition of R, arXiv 2505.02222 and 1812.06162 put together."""

    target_loss_nats: float
    quantity: str
    value: float | None


class RateRule(_OfPair, _Judged):
    """The token ratio under a rule of learning rate with batch."""

    target_loss_nats: float
    rule: str
    global_batch_tokens: int
    ratio: float | None


class Law(_Strict):
    """A power law of the critical batch: prefactor × Π variable^exponent."""

    of: str
    definition: str
    by: list[str]
    exponents: dict[str, float | None]
    prefactor: float | None
    intervals: dict[str, Interval] = Field(description="of each exponent, and of `prefactor`")
    level: float
    model: str | None
    optimizer: str
    protocol: str
    target_loss_nats: float | None
    n: int
    verdict: str
    reasons: list[str]
    explanation: str


class LossLaw(_Judged):
    """L(D) = E + A D^-β of one cell; the interval is that of β."""

    model: str
    optimizer: str
    protocol: str
    global_batch_tokens: int
    floor_nats: float | None
    floor_nats_interval: Interval
    exponent: float | None
    log_prefactor: float | None
    num_budgets: int
    min_tokens: float | None
    max_tokens: float | None


class Refused(_Strict):
    what: str
    reason: str


class Fit(_Strict):
    """The answer of `critbatch fit`."""

    schema_version: Literal[1] = 1
    tokens_to_target: list[TokensToTarget]
    critical_batch: list[CriticalBatch]
    token_ratio: list[TokenRatio]
    ratio_trend: list[RatioTrend]
    ratio_decomposition: list[RatioPart]
    rate_rules: list[RateRule]
    loss_laws: list[LossLaw]
    laws: list[Law]
    refused: list[Refused]
    notes: list[str] = Field(description="what was assumed in reading the input")


class FinalLoss(_Judged):
    """Loss of one optimizer and batch at the end of a token budget, at its best rate."""

    model: str
    optimizer: str
    protocol: str
    global_batch_tokens: int
    token_budget: int
    final_loss_nats: float | None
    learning_rate: float | None
    n: int


class Gap(_OfPair, _Judged):
    """Final loss of the baseline less that of the challenger."""

    global_batch_tokens: int
    token_budget: int
    gap_nats: float | None
    p_value: float | None
    p_value_holm: float | None


class IsoLossBatch(_OfPair, _Judged):
    """The batch that the challenger may use at the baseline's loss and tokens, over the baseline's."""

    global_batch_tokens: int
    token_budget: int
    batch_ratio: float | None
    lower_bound: float | None


class Speedup(_OfPair, _Judged):
    """Tokens that the baseline's loss law needs for the challenger's loss, over the challenger's tokens."""

    token_budget: int
    token_ratio: float | None


class Tuning(_Strict):
    """What tuning has cost."""

    model: str
    optimizer: str
    num_runs: int
    num_settings: int
    num_batches: int
    tokens: int
    grid_tokens: int
    train_flops: float | None
    train_seconds: float | None


class Compare(_Strict):
    """The answer of `critbatch compare`."""

    schema_version: Literal[1] = 1
    final_loss: list[FinalLoss]
    gap: list[Gap]
    iso_loss_batch: list[IsoLossBatch]
    speedup: list[Speedup]
    tuning: list[Tuning]
    refused: list[Refused]
    notes: list[str]


class Point(_OfSeries, _Judged):
    """Time and cost to a target; the interval is that of train_seconds."""

    kind: Literal["measured", "projected"]
    device: str | None
    global_batch_tokens: int
    num_devices: int
    train_seconds: float
    device_seconds: float
    device_seconds_interval: Interval
    train_flops: float | None
    model_error: float | None
    on_frontier: bool
    on_flops_frontier: bool


class Dominance(_OfPair, _Judged):
    """Where on the time axis the challenger's frontier costs less; the interval is that of the share."""

    target_loss_nats: float
    kind: str
    cost: str
    share: float | None
    cost_ratio: float | None
    cost_ratio_interval: Interval
    from_seconds: float | None
    to_seconds: float | None


class Choice(_Strict):
    """The fastest point within a budget of device-seconds, or the cheapest within a deadline in seconds."""

    model: str
    target_loss_nats: float
    protocol: str
    kind: str
    question: Literal["fastest", "cheapest"]
    limit: float
    optimizer: str | None
    global_batch_tokens: int | None
    num_devices: int | None
    train_seconds: float | None
    device_seconds: float | None
    verdict: str
    reasons: list[str]
    explanation: str


class Constant(_Strict):
    """A constant of the cost model."""

    name: str
    value: float | None
    unit: str
    source: str


class Frontier(_Strict):
    """The answer of `critbatch frontier`."""

    schema_version: Literal[1] = 1
    points: list[Point]
    dominance: list[Dominance]
    choices: list[Choice]
    cost_model: list[Constant]
    refused: list[Refused]
    notes: list[str]


def json_schema() -> dict[str, Any]:
    """Return the JSON Schemas of the answers, by verb."""
    return {model.__name__.lower(): model.model_json_schema() for model in (Fit, Compare, Frontier)}

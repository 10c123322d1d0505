"""What a run is (`RunConfig`, hashed into its `run_id`) and where it runs (`MachineConfig`, recorded, not hashed).

Imports no torch: read-only verbs and the analysis read configurations too.
"""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.batch_clock import BatchClock, BatchStage, BatchWarmup
from harness.frozen import ADDED_LATER, Frozen, nearest
from harness.identity import NOT_SCIENCE, NOT_SCIENCE_OF_RUN, SCIENCE_VERSION
from harness.model_presets import MODEL_PRESETS
from harness.optimizers.config import DecayRate, HalfLife, NonNegative, OptimizerConfig, Positive
from harness.parametrization import ParametrizationConfig

Count = Annotated[int, Field(gt=0)]


class CorpusConfig(Frozen):
    """Which text, cut into tokens how. `fingerprint` and `vocab_size` are filled in when the corpus is prepared.

    `paths` holds files or globs for the sources `text`, `jsonl` and `bin`; for `huggingface` it is `[name]` or
    `[name, configuration]` of a data set, whose part `train` is read. In a sweep file, relative paths (`tokenizer_path`
    too) count from that file's folder.

    `validation_share` of the documents, chosen by a hash of their path (files) or their text (rows), is for validation.
    A single text file is split by position instead: its last `validation_share`, from the start of a line on. Token
    files are split by their names (see `harness.token_files`).

    `max_tokens` ends the reading of text, in the order of names or rows, with the document that gives the train split
    that many tokens.
    """

    source: Literal["python-stdlib", "site-packages", "text", "jsonl", "bin", "huggingface"]
    paths: tuple[str, ...] = ()
    text_field: str = "text"
    tokenizer: Literal["bytes", "ascii", "tiktoken", "tokenizers"] = "bytes"
    tokenizer_path: str | None = None
    max_tokens: Count | None = None
    validation_share: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    max_epochs: Positive = 1.0
    fingerprint: str | None = None
    vocab_size: Count | None = None


class ModelConfig(Frozen):
    """A decoder-only transformer: pre-norm, RoPE, causal attention without biases.

    `preset` names a shape of `harness.model_presets`; any key given beside it wins. `mlp_width` defaults to 4 ×
    width, and to the nearest multiple of 8 above 8/3 × width for SwiGLU, which has three matrices. `vocab_size` is
    the corpus' own.
    """

    preset: str | None = None
    width: Count
    layers: Count
    heads: Count
    kv_heads: Count
    mlp_width: Count
    sequence_length: Count
    vocab_size: Count | None = None
    activation: Literal["relu2", "swiglu", "gelu"] = "relu2"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    qk_norm: bool = True
    tied_head: bool = False
    rope_base: Positive = 10_000.0
    parametrization: Annotated[ParametrizationConfig, ADDED_LATER] = ParametrizationConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        shape = _preset_shape(given.get("preset")) | given
        if {"width", "heads"} <= shape.keys():
            shape.setdefault("kv_heads", shape["heads"])
            shape.setdefault("mlp_width", _default_mlp_width(shape["width"], shape.get("activation", "relu2")))
        return shape

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelConfig":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} over {self.heads} heads gives {self.width / self.heads:g} per head; "
                "RoPE needs an even whole number"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        self.parametrization.check(self.width, self.head_width, self.tied_head)
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def known_vocab_size(self) -> int:
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known yet: prepare the corpus first")
        return self.vocab_size


class ScheduleConfig(Frozen):
    """Learning rate over tokens: linear warmup, then constant, cosine, linear or warmup–stable–decay.

    Warmup lasts `warmup_tokens`, and at least `warmup_min_steps` optimizer steps. `final_fraction` is the rate at the
    end over the peak (for the decaying kinds); `decay_share` the share of the budget that `wsd` decays over.
    """

    kind: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_tokens: Annotated[int, Field(ge=0)] = 0
    warmup_min_steps: Annotated[int, Field(ge=0)] = 0
    max_warmup_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2


class AveragingConfig(Frozen):
    """Averages of the weights, evaluated beside the raw ones.

    `power_ema` has the relative width `sigma` (arXiv 2312.02696, eq. 3 and appendix C: the profile grows with the
    run, so one number serves every length); `ema` the decay rate `decay`, in steps or as a half-life in tokens.
    """

    kind: Literal["none", "power_ema", "ema"] = "none"
    sigma: Annotated[float, Field(gt=0.0, lt=0.28)] = 0.1
    decay: DecayRate = 0.99


class EvaluationConfig(Frozen):
    """Validation on the same `tokens` for every run, at token marks first · 2^(k / marks_per_doubling)."""

    tokens: Count = 16_384
    first_mark_tokens: Count = 16_384
    marks_per_doubling: Count = 4


class DiagnosticsConfig(Frozen):
    """What is measured of gradients and updates beside the losses, at every `every_marks`-th evaluation and the last.

    They change no number of a run, and take time of their own, which counts as evaluation: results/README.md says how
    much. A run that has finished is not measured again.

    `sharpness_tokens`: validation text on which the curvature is measured, the same for every run.
    """

    noise_scale: bool = False
    sharpness: bool = False
    update_norms: bool = False
    spectra: bool = False
    sharpness_tokens: Count = 2048
    every_marks: Count = 1

    @property
    def any_of_updates(self) -> bool:
        return self.sharpness or self.update_norms or self.spectra


class Branch(Frozen):
    """Where a run starts from another one's state, instead of from nothing.

    The configuration is that of the whole run: without its `branch`, it is trained from token 0 and gives the same
    numbers. `at_tokens` are those that the run `parent` has seen, and kept its state at (`keep_at_tokens`).
    """

    parent: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    at_tokens: Count
    kind: Literal["decay", "batch"]


class RunConfig(Frozen):
    """Everything that changes the numbers of one run: one model, one optimizer, one global batch, one seed."""

    list_advice: ClassVar[str] = "one value belongs here; to sweep it, put {} under grid"

    corpus: CorpusConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    global_batch_tokens: Count
    token_budget: Count
    schedule: ScheduleConfig = ScheduleConfig()
    averaging: AveragingConfig = AveragingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    max_grad_norm: Positive | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    stop_at_loss_nats: Positive | None = None
    batch_warmup: Annotated[BatchWarmup | None, ADDED_LATER] = None
    branch: Annotated[Branch | None, ADDED_LATER] = None
    keep_at_tokens: Annotated[tuple[Count, ...], ADDED_LATER] = ()
    diagnostics: Annotated[DiagnosticsConfig, ADDED_LATER] = DiagnosticsConfig()
    init_seed: Annotated[int, Field(ge=0)] = 0
    data_seed: Annotated[int, Field(ge=0)] = 0
    science_version: int = SCIENCE_VERSION

    @model_validator(mode="after")
    def _check_batch(self) -> "RunConfig":
        for stage in self._stages:
            _check_whole_sequences(stage.global_batch_tokens, self.model.sequence_length)
        batch, begin = self.global_batch_tokens, self._stages[-1].until_tokens if self._stages else 0
        _check_whole_sequences(batch, self.model.sequence_length)
        if self.token_budget - begin < batch:
            after = f" after the {begin} of its batch_warmup" if begin else ""
            raise ValueError(
                f"token_budget {self.token_budget} is smaller than one global batch of {batch} tokens{after}; "
                f"raise the budget or lower the batch"
            )
        return self

    @model_validator(mode="after")
    def _check_half_lives(self) -> "RunConfig":
        for rule in (self.optimizer, getattr(self.optimizer, "auxiliary", None)):
            betas = getattr(rule, "betas", ())
            if self.batch_warmup and len({isinstance(beta, HalfLife) for beta in betas}) > 1:
                raise ValueError(
                    f"betas {[str(beta) for beta in betas]} are both rates per step or both half-lives where the batch "
                    f"changes: moments are corrected for their start at zero by one count of steps"
                )
        return self

    @model_validator(mode="after")
    def _check_parametrization(self) -> "RunConfig":
        self.model.parametrization.check_optimizer(self.optimizer, self.model.width)
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> "RunConfig":
        limit = self.schedule.max_warmup_share * self.realized_tokens
        if self.warmup_effective_tokens > limit:
            raise ValueError(
                f"warmup of {self.warmup_effective_tokens} tokens ({self.warmup_steps} steps of "
                f"{self.global_batch_tokens}) is more than {self.schedule.max_warmup_share:.0%} of the run's "
                f"{self.realized_tokens}; lower schedule.warmup_tokens or schedule.warmup_min_steps, "
                "or raise token_budget"
            )
        return self

    @model_validator(mode="after")
    def _check_branch(self) -> "RunConfig":
        if self.branch is None:
            return self
        at_tokens = self.branch.at_tokens
        self.clock.check_step_end("branch.at_tokens", at_tokens)
        if at_tokens == self.realized_tokens:
            raise ValueError(f"branch.at_tokens {at_tokens} is the end of the run; raise token_budget")
        if self.branch.kind == "batch" and (not self._stages or self._stages[-1].until_tokens != at_tokens):
            raise ValueError(
                f"a branch of the kind batch changes its batch at branch.at_tokens {at_tokens}: end the last of "
                f"batch_warmup.stages there"
            )
        if self.branch.kind == "decay" and (self.schedule.kind != "wsd" or at_tokens > self.stable_tokens):
            raise ValueError(
                f"a branch of the kind decay is a run of schedule.kind wsd that starts to decay after branch.at_tokens "
                f"{at_tokens}; here the kind is {self.schedule.kind}"
                + (f" and {self.stable_tokens} the last tokens at the peak" if self.schedule.kind == "wsd" else "")
            )
        return self

    @model_validator(mode="after")
    def _check_keep(self) -> "RunConfig":
        for tokens in self.keep_at_tokens:
            self.clock.check_step_end("keep_at_tokens", tokens)
        return self

    @model_validator(mode="after")
    def _check_diagnostics(self) -> "RunConfig":
        tokens, sequence = self.diagnostics.sharpness_tokens, self.model.sequence_length
        if self.diagnostics.sharpness and (tokens % sequence or tokens > self.evaluation.tokens):
            raise ValueError(
                f"diagnostics.sharpness_tokens {tokens} is not a whole number of sequences of {sequence} tokens within "
                f"the {self.evaluation.tokens} of evaluation.tokens"
            )
        return self

    @property
    def _stages(self) -> tuple[BatchStage, ...]:
        return self.batch_warmup.stages if self.batch_warmup else ()

    @property
    def clock(self) -> BatchClock:
        """Steps, tokens and the batch of each step."""
        stages = tuple((stage.until_tokens, stage.global_batch_tokens) for stage in self._stages)
        return BatchClock(self.global_batch_tokens, self.token_budget, stages)

    @property
    def steps(self) -> int:
        """Whole optimizer steps in the budget."""
        return self.clock.steps

    @property
    def realized_tokens(self) -> int:
        """Tokens that whole steps give; at most `token_budget`."""
        return self.clock.realized_tokens

    @property
    def first_step(self) -> int:
        """Steps that a branch does not take: its parent has; 0 without one."""
        return self.clock.steps_within(self.branch.at_tokens) if self.branch else 0

    @property
    def warmup_steps(self) -> int:
        return max(self.clock.steps_reaching(self.schedule.warmup_tokens), self.schedule.warmup_min_steps)

    @property
    def warmup_effective_tokens(self) -> int:
        return self.clock.tokens_after(self.warmup_steps)

    @property
    def decay_tokens(self) -> int:
        """Tokens that `wsd` decays over: whole steps of the run's own batch, at least one, at most all after warmup."""
        batch, after_warmup = self.global_batch_tokens, self.realized_tokens - self.warmup_effective_tokens
        steps = round(self.schedule.decay_share * (self.realized_tokens / batch))
        return min(max(steps, 1) * batch, max(after_warmup, batch))

    @property
    def stable_tokens(self) -> int:
        """Tokens after the last step before which `wsd` has not begun to decay: a branch that decays starts there."""
        return self.clock.tokens_after(self.clock.steps_within(self.realized_tokens - self.decay_tokens) + 1)

    @property
    def protocol(self) -> str:
        """How the losses of this curve may be matched to tokens; results/README.md defines each protocol."""
        if self.branch is not None:
            return f"branched_{self.branch.kind}"
        if self.schedule.kind != "constant":
            return "mid_schedule"
        return "constant_raw" if self.averaging.kind == "none" else "constant_ema"

    @property
    def run_id(self) -> str:
        """`<model>-<optimizer>-b<tokens>-lr<lr>-s<seed>-<hash>`; the hash is of the resolved configuration, defaults
        included.

        Left out are a preset's name (its shape counts), places of files and how much of them is read (the fingerprint
        counts), limits that only refuse, and fields that were added later (`ADDED_LATER`) while at their default.
        """
        science = self.model_dump(mode="json", exclude={**NOT_SCIENCE, **dict.fromkeys(NOT_SCIENCE_OF_RUN, True)})
        canonical = json.dumps(science, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
        seed = f"{self.init_seed}" if self.init_seed == self.data_seed else f"{self.init_seed}.{self.data_seed}"
        cell = f"{self.model_name}-{self.optimizer.name}-b{self.global_batch_tokens}"
        return f"{cell}-lr{self.optimizer.peak_lr:.4g}-s{seed}-{digest}"

    @property
    def model_name(self) -> str:
        return self.model.preset or f"d{self.model.width}l{self.model.layers}"


class MachineConfig(Frozen):
    """Where a run runs; nothing here may change what it computes beyond the order of a sum.

    With `checkpoint_every_seconds: auto` a run saves every minute, or more seldom where that would take a twentieth of
    its time.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Count = 1
    max_micro_batch_tokens: Count = 2048
    threads: Count | None = None
    compile: bool = False
    checkpoint_every_seconds: NonNegative | Literal["auto"] = "auto"


def _check_whole_sequences(batch: int, sequence: int) -> None:
    if batch % sequence:
        below = batch // sequence * sequence
        raise ValueError(
            f"global_batch_tokens {batch} is not a whole number of sequences of {sequence} tokens "
            f"({batch / sequence:g}); the nearest are {below or sequence} and {below + sequence}"
        )


def _preset_shape(name: Any) -> dict[str, Any]:
    if name is None:
        return {}
    if not isinstance(name, str):
        raise ValueError(f"preset {name!r} is not one name; to sweep it, put model.preset under grid")
    if name not in MODEL_PRESETS:
        raise ValueError(f"unknown model preset {name!r}; {nearest(name, MODEL_PRESETS)}")
    return dict(MODEL_PRESETS[name])


def _default_mlp_width(width: int, activation: str) -> int:
    return -(-8 * width // 3 // 8) * 8 if activation == "swiglu" else 4 * width

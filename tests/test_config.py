"""What a run is: identity, resolution of defaults, and mistakes that are named."""

from typing import Any

import pytest

from harness.config import CorpusConfig, ModelConfig, RunConfig

BASE: dict[str, Any] = {
    "corpus": {"source": "python-stdlib", "tokenizer": "ascii", "fingerprint": "abc", "vocab_size": 128},
    "model": {"preset": "115k", "vocab_size": 128},
    "optimizer": {"name": "muon", "peak_lr": 0.032},
    "global_batch_tokens": 1024,
    "token_budget": 524_288,
}


def parse(**changes: Any) -> RunConfig:
    return RunConfig.parse(BASE | changes, "sweep.yaml")


def test_run_id_is_frozen() -> None:
    """A changed id of an unchanged configuration would orphan every finished run: raise SCIENCE_VERSION instead."""
    assert parse().run_id == "115k-muon-b1024-lr0.032-s0-5caef8ba"


def test_run_id_does_not_depend_on_how_the_configuration_is_written() -> None:
    explicit = {"width": 64, "layers": 2, "heads": 2, "sequence_length": 64, "norm": "layernorm", "vocab_size": 128}
    spelled_out = parse(model=explicit, token_budget=524_288, max_grad_norm=None)
    assert spelled_out.run_id.split("-")[-1] == parse().run_id.split("-")[-1]
    elsewhere = BASE["corpus"] | {"paths": ["/elsewhere/*.txt"], "max_tokens": 1_000_000}
    assert parse(corpus=elsewhere).run_id == parse().run_id


@pytest.mark.parametrize(
    "change",
    [
        {"global_batch_tokens": 2048},
        {"token_budget": 525_312},
        {"init_seed": 1},
        {"data_seed": 1},
        {"precision": "bf16"},
        {"max_grad_norm": 1.0},
        {"stop_at_loss_nats": 2.0},
        {"schedule": {"warmup_tokens": 1024}},
        {"averaging": {"kind": "ema"}},
        {"evaluation": {"tokens": 32_768}},
        {"optimizer": {"name": "muon", "peak_lr": 0.032, "newton_schulz_dtype": "float32"}},
        {"optimizer": {"name": "adamw", "peak_lr": 0.032}},
        {"corpus": BASE["corpus"] | {"fingerprint": "abd"}},
        {"model": BASE["model"] | {"activation": "gelu"}},
        {"science_version": 2},
    ],
)
def test_run_id_changes_with_everything_that_changes_numbers(change: dict[str, Any]) -> None:
    assert parse(**change).run_id != parse().run_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch_token": 3}, "'global_batch_token' is not a key of the top level; did you mean .global_batch_t"),
        ({"model": {"preset": "115k", "widht": 3}}, "'widht' is not a key of model; did you mean 'width'?"),
        ({"model": {"preset": "115m"}}, "unknown model preset '115m'; did you mean '115k'?"),
        ({"optimizer": {"name": "muon", "peak_lr": 0.1, "momentun": 0.9}}, "did you mean 'momentum'?"),
        ({"optimizer": {"name": "muno", "peak_lr": 0.1}}, "unknown optimizer 'muno'; did you mean 'muon'?"),
        ({"optimizer": {"name": "muon"}}, "optimizer.peak_lr is missing$"),
        ({"optimizer": {"name": "muon", "peak_lr": float("nan")}}, "peak_lr: expected a finite number, not nan"),
        ({"global_batch_tokens": 1000}, "1000 is not a whole number of sequences of 64 .*nearest are 960 and 1024"),
        ({"token_budget": 1000}, "token_budget 1000 is smaller than one global batch of 1024 tokens"),
        ({"schedule": {"warmup_tokens": 400_000}}, "warmup of 400384 tokens .391 steps of 1024. is more than 50%"),
        ({"schedule": {"warmup_min_steps": 300}}, "300 steps of 1024. is more than 50% of the run's 524288"),
        ({"model": {"width": 63, "layers": 1, "heads": 2, "sequence_length": 64}}, "31.5 per head"),
        ({"model": {"preset": "115k", "heads": 4, "kv_heads": 3}}, "heads 4 is not a multiple of kv_heads 3"),
        ({"batch_size": 3}, "'batch_size' is not a key of the top level; did you mean 'global_batch_tokens'?"),
        ({"optimizer": {"name": "adamw", "peak_lr": 0.1, "beta1": 1}}, "of optimizer; did you mean 'betas'?"),
        ({"optimizer": {"name": "adamw", "lr": 0.1, "peak_lr": 0.1}}, "did you mean 'peak_lr'?"),
        ({"optimizer": {"name": "muon", "peak_lr": 0.1, "momentum": 1.5}},
         "optimizer.momentum: expected a number below 1 or a mapping of keys, not 1.5$"),
        ({"optimizer": {"name": "muon", "peak_lr": 0.1, "momentum": {"half_life_tokens": -1}}},
         "optimizer.momentum.half_life_tokens: expected a number above 0, not -1$"),
        ({"optimizer": {"name": "adamw", "peak_lr": 0.1, "betas": 0.9}}, "optimizer.betas: expected a list, not 0.9"),
        ({"global_batch_tokens": [256, 512]},
         "global_batch_tokens: expected a whole number, not .256, 512.; .* to sweep it, put global_batch_tokens under"),
        ({"model": {"preset": ["115k", "5m"]}}, "model: preset .* is not one name; .* put model.preset under grid$"),
        ({"init_seed": True}, "init_seed cannot be true"),
        ({"model": "115k"}, "model: expected a mapping of keys, not '115k'$"),
        ({"averaging": {"kind": "power_ema", "sigma": 0.4}}, "averaging.sigma: expected a number below 0.28, not 0.4"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(**change)
    assert str(caught.value).startswith("sweep.yaml: ")
    assert "\n" not in str(caught.value)


def test_missing_key_is_named_without_the_configuration_around_it() -> None:
    with pytest.raises(ValueError, match="missing") as caught:
        RunConfig.parse({key: value for key, value in BASE.items() if key != "corpus"}, "sweep.yaml")
    assert str(caught.value) == "sweep.yaml: corpus is missing"


def test_model_preset_gives_way_to_keys_beside_it() -> None:
    model = ModelConfig.parse({"preset": "5m", "width": 128, "activation": "swiglu"}, "test")
    assert (model.width, model.layers, model.heads, model.kv_heads, model.mlp_width) == (128, 6, 4, 4, 344)


def test_vocabulary_of_an_unprepared_corpus_is_an_error_not_a_guess() -> None:
    with pytest.raises(ValueError, match="prepare the corpus first"):
        _ = ModelConfig.parse({"preset": "115k"}, "test").known_vocab_size
    assert CorpusConfig(source="python-stdlib").fingerprint is None


@pytest.mark.parametrize(
    ("schedule", "averaging", "protocol"),
    [
        ("constant", "power_ema", "constant_ema"),
        ("constant", "none", "constant_raw"),
        ("cosine", "power_ema", "mid_schedule"),
        ("wsd", "none", "mid_schedule"),
    ],
)
def test_protocol_follows_schedule_and_averaging(schedule: str, averaging: str, protocol: str) -> None:
    assert parse(schedule={"kind": schedule}, averaging={"kind": averaging}).protocol == protocol

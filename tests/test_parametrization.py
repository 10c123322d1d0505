"""muP: the table of multipliers, what it refuses, and that the standard parametrization is untouched."""

import math
from typing import Any

import pytest
import torch

from harness.config import ModelConfig, RunConfig
from harness.model import Transformer
from harness.optimizers.combined import Route, build_optimizer, route
from harness.parametrization import check_head_widths
from tests.test_config import BASE
from tests.test_optimizer_registry import example

MUP = {"kind": "mup", "base_width": 16}


def model(width: int = 64, **changes: Any) -> ModelConfig:
    shape = {"width": width, "layers": 2, "heads": width // 8, "sequence_length": 16, "vocab_size": 50}
    return ModelConfig.parse(shape | {"parametrization": MUP} | changes, "test")


def run(width: int = 64, optimizer: dict[str, Any] | None = None, **parametrization: Any) -> RunConfig:
    shape = {"width": width, "layers": 2, "heads": width // 8, "sequence_length": 64, "vocab_size": 128}
    given = {"model": shape | {"parametrization": MUP | parametrization}}
    return RunConfig.parse(BASE | given | {"optimizer": optimizer or {"name": "adamw", "peak_lr": 0.01}}, "sweep.yaml")


def by_role(config: ModelConfig, name: str, **settings: Any) -> dict[str, Route]:
    return {each.parameter.role: each for each in route(config, example(name, **settings))}


@pytest.mark.parametrize(
    ("name", "settings", "head", "rates"),
    [
        ("adamw", {}, "logits", (1, 1 / 4, 1, 1)),
        ("adamw", {}, "rate", (1, 1 / 4, 1 / 4, 1)),
        ("lion", {}, "rate", (1, 1 / 4, 1 / 4, 1)),
        ("lamb", {}, "logits", (1, 1 / 2, 1, 1)),
        ("muon", {"scale": "spectral"}, "logits", (1, 1, 1, 1)),
        ("muon", {"scale": "original"}, "rate", (1, 1, 1 / 4, 1)),
        ("muon", {"scale": "match_rms_adamw"}, "logits", (1, 1 / 2, 1, 1)),
        ("scion", {}, "logits", (3000 * 4, 50, 3000 * 4, 1)),
        ("scion", {}, "rate", (3000 * 4, 50, 3000, 1)),
    ],
)
def test_rates_at_four_times_the_base_width_are_those_of_the_table(
    name: str, settings: dict[str, Any], head: str, rates: tuple[float, ...]
) -> None:
    found = by_role(model(parametrization=MUP | {"head": head}), name, **settings)
    expected = dict(zip(("embedding", "hidden", "head", "norm"), rates, strict=True))
    assert {role: each.lr_multiplier for role, each in found.items()} == expected


def test_rate_times_decay_does_not_change_with_the_width_unless_decay_is_coupled() -> None:
    for name, settings in (("adamw", {}), ("muon", {}), ("scion", {}), ("lion", {})):
        base, wide = by_role(model(16), name, **settings), by_role(model(64), name, **settings)
        for role, each in wide.items():
            own = base[role]
            assert each.lr_multiplier * each.weight_decay == pytest.approx(own.lr_multiplier * own.weight_decay)
    coupled = by_role(model(parametrization=MUP | {"weight_decay": "coupled"}), "adamw", weight_decay=0.1)
    assert coupled["hidden"].weight_decay == 0.1


def test_lambs_decay_grows_as_adamws() -> None:
    assert by_role(model(), "lamb", weight_decay=0.01)["hidden"].weight_decay == pytest.approx(0.04)


def test_adamws_table_for_muon_is_a_named_option() -> None:
    for scale in ("spectral", "match_rms_adamw", "original"):
        found = by_role(model(parametrization=MUP | {"muon": "adamw_table"}), "muon", scale=scale)
        assert found["hidden"].lr_multiplier == 1 / 4


def test_multipliers_reach_the_groups_of_the_optimizer() -> None:
    config = model()
    optimizer = build_optimizer(Transformer(config), config, example("adamw"), tokens_per_step=16)
    optimizer.set_learning_rate(0.02)
    assert {group["lr"] for group in optimizer.param_groups} == {0.02, 0.005}


@pytest.mark.parametrize(("head", "tied"), [("logits", False), ("rate", False), ("logits", True)])
def test_model_of_the_base_width_is_the_standard_one_bit_for_bit(head: str, tied: bool) -> None:
    outputs = []
    for parametrization in ({"kind": "standard"}, {"kind": "mup", "base_width": 32, "head": head}):
        network = Transformer(model(32, parametrization=parametrization, tied_head=tied))
        network.initialise(0)
        outputs.append(network(torch.arange(16)[None]))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("head", ["logits", "rate"])
def test_logits_at_the_start_fall_with_the_root_of_the_width(head: str) -> None:
    sizes = []
    for width in (64, 1024):
        network = Transformer(model(width, layers=1, parametrization=MUP | {"head": head}))
        network.initialise(0)
        with torch.no_grad():
            sizes.append(float(network(torch.arange(16).expand(8, -1)).std()))
    assert sizes[0] / sizes[1] == pytest.approx(4.0, rel=0.1)


def test_both_conventions_of_the_head_train_alike_by_adamw() -> None:
    """Source: arXiv 2203.03466, lemma J.1; AdamW's ε is what differs, so that it is small here."""
    losses = []
    for head in ("logits", "rate"):
        config = model(parametrization=MUP | {"head": head})
        network = Transformer(config)
        network.initialise(0)
        optimizer = build_optimizer(network, config, example("adamw", eps=1e-30), tokens_per_step=16)
        for _ in range(3):
            optimizer.set_learning_rate(0.01)
            optimizer.zero_grad()
            tokens = torch.arange(17)[None]
            loss = torch.nn.functional.cross_entropy(network(tokens[:, :-1])[0], tokens[0, 1:])
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_attention_is_divided_by_the_width_of_a_head_relative_to_the_bases() -> None:
    growing = model(64, heads=2, parametrization=MUP | {"base_head_width": 8})
    assert growing.parametrization.attention_scale(growing.head_width) == math.sqrt(8) / 32
    assert model(64).parametrization.attention_scale(8) == pytest.approx(1 / math.sqrt(8))
    assert model(parametrization={}).parametrization.attention_scale(8) is None


def test_parametrization_enters_the_identity_unless_it_is_the_standard_one() -> None:
    plain = BASE | {"model": {"preset": "115k", "vocab_size": 128, "parametrization": {"kind": "standard"}}}
    assert RunConfig.parse(plain, "test").run_id == RunConfig.parse(BASE, "test").run_id
    ids = {run().run_id, run(head="rate").run_id, run(base_width=32).run_id, run(weight_decay="coupled").run_id}
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"base_width": None}, "mup needs base_width"),
        ({"base_width": 48}, "base_width 48 does not divide the width 64"),
        ({"base_width": 128}, "base_width 128 does not divide the width 64"),
        ({"base_head_width": 12}, "heads 8 wide do not fit into the base of width 16"),
        ({"kind": "standard", "base_width": 16}, "base_width says nothing while parametrization.kind is standard"),
        ({"optimizer": {"name": "soap", "peak_lr": 0.01}}, "muP has no rule for soap on hidden parameters"),
        ({"optimizer": {"name": "sgd", "peak_lr": 0.01}}, "muP has no rule for sgd on hidden parameters"),
        (
            {"optimizer": {"name": "scion", "peak_lr": 0.01, "head": {"lmo": "spectral", "radius": 1}}},
            "muP has no rule for scion spectral on head parameters",
        ),
    ],
)
def test_what_muP_cannot_say_is_refused_in_one_line(given: dict[str, Any], words: str) -> None:  # noqa: N802
    with pytest.raises(ValueError, match=words) as caught:
        run(**given)
    assert len(str(caught.value).splitlines()) == 1


def test_heads_that_fit_no_base_are_refused() -> None:
    with pytest.raises(ValueError, match="heads 32 wide do not fit into the base of width 16"):
        model(64, heads=2)
    with pytest.raises(ValueError, match="tied head has no rate"):
        model(tied_head=True, parametrization=MUP | {"head": "rate"})


def test_heads_that_change_their_width_unsaid_are_refused() -> None:
    changing = [model(16, heads=2), model(64, heads=4)]
    with pytest.raises(ValueError, match="heads are 8 wide at width 16 and 16 at width 64"):
        check_head_widths((each.width, each.head_width, each.parametrization) for each in changing)
    said = [model(each.width, heads=each.heads, parametrization=MUP | {"base_head_width": 8}) for each in changing]
    check_head_widths((each.width, each.head_width, each.parametrization) for each in said)

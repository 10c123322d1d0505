"""The transformer against its shape table, its stated initialisation and causality."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.config import ModelConfig
from harness.flops import (
    count_nonembedding_parameters,
    count_parameters,
    forward_backward_flops_per_token,
    optimizer_flops_per_step,
)
from harness.model import Transformer, rotary_table, rotate
from harness.model_presets import MODEL_PRESETS
from harness.optimizers.config import AdamWConfig, MuonConfig
from harness.shapes import parameters

VARIANTS = [
    {},
    {"activation": "swiglu"},
    {"activation": "gelu", "norm": "layernorm"},
    {"tied_head": True, "qk_norm": False},
    {"heads": 4, "kv_heads": 2},
]


def model_config(**changes: object) -> ModelConfig:
    shape = {"width": 32, "layers": 2, "heads": 2, "sequence_length": 16, "vocab_size": 50}
    return ModelConfig.parse(shape | changes, "test")


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_list_the_parameters_of_the_network_in_order(variant: dict[str, object]) -> None:
    config = model_config(**variant)
    network = Transformer(config)
    assert [(p.name, p.shape) for p in parameters(config)] == [
        (name, tuple(weight.shape)) for name, weight in network.named_parameters()
    ]
    assert count_parameters(config) == sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_count_every_matrix_product_of_the_forward_pass(variant: dict[str, object]) -> None:
    """PyTorch's own counter sees the multiplications; ours is three times its forward pass, per token.

    It knows no fused attention of the CPU, so that the plain one is taken, which multiplies in full.
    """
    config = model_config(**variant)
    network = Transformer(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(3, config.sequence_length, dtype=torch.long))
    forward = counter.get_total_flops() / (3 * config.sequence_length)
    assert 3 * forward == forward_backward_flops_per_token(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_network_is_causal(variant: dict[str, object]) -> None:
    config = model_config(**variant)
    network = Transformer(config)
    network.initialise(0)
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9:] = 7
    before, after = network(tokens), network(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_loss_is_near_that_of_unit_logits(variant: dict[str, object]) -> None:
    """Logits of unit variance cost about ½ nat more than the uniform ln V."""
    config = model_config(width=128, **variant)
    network = Transformer(config)
    network.initialise(1)
    tokens = torch.randint(0, 50, (64, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network(tokens[:, :-1])
    # a tied head gives the token that was read a larger logit: it meets its own embedding in the residual stream
    logits.scatter_(-1, tokens[:, :-1, None], -torch.inf)
    target = tokens[:, 1:].masked_fill(tokens[:, 1:] == tokens[:, :-1], -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert float(logits[logits.isfinite()].std()) == pytest.approx(1.0, abs=0.15)
    assert float(loss) == pytest.approx(math.log(49) + 0.5, abs=0.15)


def test_initialise_depends_on_the_seed_alone() -> None:
    networks = [Transformer(model_config()) for _ in range(3)]
    for network, seed in zip(networks, (5, 5, 6), strict=True):
        torch.rand(3)  # the global generator must not matter
        network.initialise(seed)
    weights = [torch.cat([w.flatten() for w in network.parameters()]) for network in networks]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_initialise_gives_the_stated_standard_deviations() -> None:
    network = Transformer(model_config(width=128, layers=2, vocab_size=512))
    network.initialise(0)
    weights = dict(network.named_parameters())
    expected = {
        "embedding.weight": 1.0,
        "head.weight": 1 / math.sqrt(128),
        "blocks.0.attention.query.weight": 1 / math.sqrt(128),
        "blocks.1.attention.output.weight": 1 / math.sqrt(128 * 4),
        "blocks.0.mlp.up.weight": 1 / math.sqrt(128),
        "blocks.0.mlp.down.weight": 1 / math.sqrt(512 * 4),
    }
    for name, standard_deviation in expected.items():
        assert float(weights[name].detach().std()) == pytest.approx(standard_deviation, rel=0.03), name


def test_rotation_makes_scores_depend_on_the_distance_alone() -> None:
    rotation = rotary_table(64, 8, 10_000.0)
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    queries, keys = rotate(query.expand(64, 8), rotation), rotate(key.expand(64, 8), rotation)
    scores = queries @ keys.T
    for distance in (0, 3, 20):
        diagonal = torch.diagonal(scores, -distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "millions"),
    [("115k", 128, 0.115), ("0.8m", 256, 0.85), ("5m", 256, 4.85), ("19m", 256, 19.1), ("124m", 50304, 162), ("354m",
    50304, 405), ("1b", 50304, 1213)],
)  # fmt: skip
def test_presets_have_the_size_they_are_named_by(preset: str, vocabulary: int, millions: float) -> None:
    config = ModelConfig.parse({"preset": preset, "vocab_size": vocabulary}, "test")
    assert count_parameters(config) / 1e6 == pytest.approx(millions, rel=0.02)
    assert set(MODEL_PRESETS) == {"115k", "0.8m", "5m", "19m", "124m", "354m", "1b"}
    assert count_nonembedding_parameters(config) < count_parameters(config)


def test_muon_flops_are_the_share_of_a_step_that_the_width_over_the_batch_predicts() -> None:
    """Blocks of 12 d² weights cost 300 d³ a step against 72 d² B of forward and backward: 25/6 · d/B."""
    config = ModelConfig.parse({"width": 512, "layers": 4, "heads": 8, "sequence_length": 8, "vocab_size": 2}, "test")
    batch = 131_072
    model_flops = batch * forward_backward_flops_per_token(config)
    share = optimizer_flops_per_step(config, MuonConfig(peak_lr=0.01)) / model_flops
    assert share == pytest.approx(25 / 6 * 512 / batch, rel=0.01)
    assert optimizer_flops_per_step(config, AdamWConfig(peak_lr=0.01)) == 0.0

"""What holds for every optimizer by name: routing, state, cost, identity, and the forms of matrices it meets."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from harness.config import ModelConfig, RunConfig
from harness.flops import optimizer_flops_per_step, optimizer_state_bytes
from harness.model import Transformer
from harness.optimizers.combined import CombinedOptimizer, build_optimizer, route
from harness.optimizers.config import OPTIMIZERS
from harness.optimizers.newton_schulz import newton_schulz_flops, orthogonalise
from harness.optimizers.rule import Optimizer
from sweeps.cli import main
from tests.test_config import parse
from tests.test_optimizers import muon_group, random_weights, set_gradients

MODEL = ModelConfig.parse({"width": 16, "layers": 2, "heads": 2, "sequence_length": 16, "vocab_size": 50}, "test")
REFERENCE = Path(__file__).parents[1] / "results" / "reference"
CUSTOM = {"path": "torch.optim:Adagrad", "state_numbers_each": 1.0}
ORTHOGONALISED = ["muon", "muon_plus", "normuon", "orscale", "orscale_lm", "mona"]
EXAMPLES: dict[str, dict[str, Any]] = {name: CUSTOM if name == "custom" else {} for name in OPTIMIZERS}


def example(name: str, **settings: Any) -> Optimizer:
    return OPTIMIZERS[name].parse({"name": name, "peak_lr": 0.01, **EXAMPLES[name], **settings}, "test")


def built(config: Optimizer) -> tuple[Transformer, CombinedOptimizer]:
    network = Transformer(MODEL)
    network.initialise(0)
    optimizer = build_optimizer(network, MODEL, config, tokens_per_step=16)
    optimizer.set_learning_rate(config.peak_lr)
    return network, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_leaves_gradients_untouched_and_moves_every_parameter(name: str) -> None:
    network, optimizer = built(example(name))
    before = [weight.detach().clone() for weight in network.parameters()]
    for step in range(2):
        gradients = set_gradients(list(network.parameters()), step)
        optimizer.step()
        for weight, gradient in zip(network.parameters(), gradients, strict=True):
            assert weight.grad is not None
            assert torch.equal(weight.grad, gradient)
    assert not any(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_checkpoint_bit_for_bit(name: str) -> None:
    (first, resumed), optimizers = zip(*(built(example(name)) for _ in range(2)), strict=True)
    for step in range(3):
        set_gradients(list(first.parameters()), step)
        optimizers[0].step()
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizers[0].state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    optimizers[1].load_state_dict(state)
    for network, optimizer in zip((first, resumed), optimizers, strict=True):
        for step in range(3, 14):
            set_gradients(list(network.parameters()), step)
            optimizer.step()
    pairs = zip(first.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_checkpoint_from_before_an_option_was_added_keeps_that_at_the_runs_own() -> None:
    _, optimizer = built(example("muon", newton_schulz_form="gram"))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.pop("newton_schulz_form", None)
    _, resumed = built(example("muon", newton_schulz_form="gram"))
    resumed.load_state_dict(saved)
    assert [group.get("newton_schulz_form") for group in resumed.param_groups].count("gram") == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_takes_the_memory_that_is_declared(name: str) -> None:
    config = example(name)
    network, optimizer = built(config)
    for step in range(2):
        set_gradients(list(network.parameters()), step)
        optimizer.step()
    for weight, (parameter, *_) in zip(network.parameters(), route(MODEL, config), strict=True):
        kept = sum(tensor.numel() for key, tensor in optimizer.state[weight].items() if key != "step")
        assert kept == config.assign(parameter.role, parameter.shape).rule.state_numbers(parameter.shape), parameter
    all_kept = sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if key != "step"
    )
    assert optimizer_state_bytes(MODEL, config) == all_kept


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("name", [*ORTHOGONALISED, "scion"])
def test_step_takes_at_most_twice_the_memory_of_its_largest_group(name: str, form: str, tmp_path: Path) -> None:
    """A group: matrices of one shape, either way up. Beside parameters, gradients and state."""
    weights = random_weights([(64, 64)] * 8 + [(256, 64)] * 2 + [(64, 256)] * 2)
    optimizer = muon_group(weights, example(name, newton_schulz_form=form))
    set_gradients(weights, 0)
    optimizer.step()  # makes the state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    profiler.export_chrome_trace(str(tmp_path / "trace"))
    events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
    memory = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    largest_group = 4 * (64 * 256) * 4
    taken = max(event["Total Allocated"] for event in memory) - before
    assert largest_group / 2 < taken <= 2 * largest_group


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(16, 16), (16, 23), (64, 16), (16, 64)])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 8])
def test_newton_schulz_flops_are_those_that_torch_counts(shape: tuple[int, int], form: Any, iterations: int) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalise([torch.randn(shape)], form=form, iterations=iterations)
    assert newton_schulz_flops(shape, form, iterations) == counter.get_total_flops()


def test_gram_form_takes_fewer_flops_on_rectangular_matrices_alone() -> None:
    for shape, fewer in (((64, 64), False), ((64, 80), False), ((64, 112), True), ((256, 64), True)):
        assert (newton_schulz_flops(shape, "gram") < newton_schulz_flops(shape, "standard")) == fewer


def test_soap_flops_are_those_that_torch_counts_between_refreshes() -> None:
    config = example("soap", refresh_every_steps=10**9)
    network, optimizer = built(config)
    for step in range(2):
        set_gradients(list(network.parameters()), step)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    assert optimizer_flops_per_step(MODEL, config) == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("name", ORTHOGONALISED)
def test_all_but_hidden_matrices_go_by_auxiliary_adamw(name: str) -> None:
    for parameter, algorithm, *_ in route(MODEL, example(name)):
        assert algorithm == (name if parameter.role == "hidden" else "adamw")


def test_adamw_with_auxiliary_has_muons_groups_and_differs_in_the_hidden_ones_alone() -> None:
    auxiliary = {"lr_multiplier": 0.5, "betas": [0.9, 0.97]}
    _, muon = built(example("muon", auxiliary=auxiliary))
    _, control = built(example("adamw", auxiliary=auxiliary, betas=[0.95, 0.99]))
    assert len(muon.param_groups) == len(control.param_groups) == 3
    for ours, its in zip(muon.param_groups, control.param_groups, strict=True):
        shapes = [weight.shape for weight in ours.pop("params")]
        assert shapes == [weight.shape for weight in its.pop("params")]
        if ours["algorithm"] == "adamw":
            assert ours == its
        else:
            assert (its["betas"], its["weight_decay"]) == ((0.95, 0.99), ours["weight_decay"])


def test_scion_routes_each_kind_of_layer_to_its_own_ball() -> None:
    found = {r.parameter.role: (r.algorithm, r.lr_multiplier, r.weight_decay) for r in route(MODEL, example("scion"))}
    assert found == {
        "embedding": ("scion sign", 3000.0, 1 / 3000),
        "norm": ("scion bias_rms", 1.0, 1.0),
        "hidden": ("scion spectral", 50.0, 1 / 50),
        "head": ("scion sign", 3000.0, 1 / 3000),
    }


def test_custom_optimizer_equals_its_own_class() -> None:
    arguments = {"momentum": 0.8, "alpha": 0.9}
    network, optimizer = built(example("custom", path="torch.optim:RMSprop", arguments=arguments, weight_decay=0.1))
    other = Transformer(MODEL)
    other.initialise(0)
    matrices, vectors = ([w for w in other.parameters() if (w.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
    reference = torch.optim.RMSprop(groups, lr=0.01, **arguments)
    for step in range(4):
        set_gradients(list(network.parameters()), step)
        set_gradients(list(other.parameters()), step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_custom_optimizer_can_have_the_hidden_matrices_alone() -> None:
    algorithms = {r.parameter.role: r.algorithm for r in route(MODEL, example("custom", parameters="hidden"))}
    assert algorithms == {"embedding": "adamw", "hidden": "custom", "head": "adamw", "norm": "adamw"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "torch.optim:Adamm"}, "optimizer.path torch.optim:Adamm: .*no attribute 'Adamm'; give module:Class"),
        ({"path": "no_such_module:Adam"}, "optimizer.path no_such_module:Adam: No module named"),
        ({"arguments": {"betaz": 1}}, "optimizer.path torch.optim:Adagrad: .*unexpected keyword argument 'betaz'"),
    ],
)
def test_mistakes_about_a_custom_optimizer_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(example("custom", **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "custom", "path": "torch.optim.Adam"}, "optimizer.path: .*pattern"),
        ({"name": "custom", "path": "a:B", "arguments": {"lr": 1}}, "lr is not given here; peak_lr is"),
        ({"name": "custom"}, "optimizer.path is missing"),
        ({"name": "normoun"}, "unknown optimizer 'normoun'; did you mean 'normuon'?"),
        ({"name": "orscale-lm"}, "did you mean 'orscale_lm'?"),
        ({"name": "soup"}, "did you mean 'soap'?"),
        ({"name": "scion", "norm": {"lmo": "spectral", "radius": 1}}, "norm.lmo 'spectral' is one of matrices"),
        ({"name": "muon_plus", "norm": "columns"}, "expected 'col', 'row', 'col_row' or 'row_col', not 'columns'"),
    ],
)
def test_mistakes_about_an_optimizer_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(optimizer={"peak_lr": 0.1, **settings})


SIDES = st.integers(1, 12)
SHAPES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3)


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(
    shapes=SHAPES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    zero_weights=st.booleans(),
    zero_gradients=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_step_keeps_any_matrix_finite(
    name: str, shapes: list[tuple[int, int]], dtype: torch.dtype, zero_weights: bool, zero_gradients: bool
) -> None:
    """1 × n, tall, wide, square; a zero matrix stays zero as long as its gradient is."""
    weights = [nn.Parameter(weight.detach().to(dtype) * (not zero_weights)) for weight in random_weights(shapes)]
    optimizer = muon_group(weights, example(name))
    for step in range(3):
        set_gradients(weights, step)
        for weight in weights:
            assert weight.grad is not None
            weight.grad.mul_(not zero_gradients)
        optimizer.step()
    for weight in weights:
        assert weight.dtype == dtype
        assert torch.isfinite(weight).all(), weight
        assert not (zero_weights and zero_gradients and weight.any()), weight


@pytest.mark.parametrize("name", [*ORTHOGONALISED, "scion"])
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_matrices_of_a_shape_are_updated_together_as_they_are_alone(name: str, form: str) -> None:
    shapes = [(8, 32), (8, 8), (32, 8), (8, 32), (8, 8), (1, 7)]
    settings = {"newton_schulz_form": form, "newton_schulz_dtype": "float32"}
    together, alone = random_weights(shapes), random_weights(shapes)
    optimizers = [muon_group(together, example(name, **settings))]
    optimizers += [muon_group([weight], example(name, **settings)) for weight in alone]
    for step in range(3):
        set_gradients(together, step)
        set_gradients(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(("dtype", "highest"), [("bfloat16", 1.5), ("float16", 1.25), ("float32", 1.21)])
def test_gram_form_bounds_the_singular_values_of_an_ill_conditioned_matrix(dtype: Any, highest: float) -> None:
    """The standard form gives at most 1.21 of them; Gram iterations without a restart give 7 in bfloat16."""
    left, _, right = torch.linalg.svd(random_weights([(128, 512)])[0].detach(), full_matrices=False)
    matrix = left @ torch.diag(torch.logspace(-3, 0, 128)) @ right
    ((result,),) = orthogonalise([matrix], dtype=dtype, form="gram")
    assert float(torch.linalg.matrix_norm(result.float(), ord=2)) <= highest


@pytest.mark.parametrize("runs", sorted(REFERENCE.glob("*/runs.parquet")), ids=lambda path: path.parent.name)
def test_published_runs_keep_their_ids_and_configurations(runs: Path) -> None:
    table = pl.read_parquet(runs, columns=["run_id", "config_json"])
    assert len(table) > 0
    for run_id, config_json in table.iter_rows():
        run = RunConfig.parse(json.loads(config_json), str(runs))
        assert run.run_id == run_id
        assert run.model_dump(mode="json") == json.loads(config_json)


def test_field_that_was_added_later_changes_the_id_only_where_it_is_set() -> None:
    muon = {"name": "muon", "peak_lr": 0.032}
    spelled_out, gram = (parse(optimizer=muon | {"newton_schulz_form": form}) for form in ("standard", "gram"))
    assert spelled_out.run_id == parse(optimizer=muon).run_id
    assert gram.run_id != spelled_out.run_id
    assert gram.model_dump()["optimizer"]["newton_schulz_form"] == "gram"
    adamw = {"name": "adamw", "peak_lr": 0.032}
    assert parse(optimizer=adamw | {"auxiliary": {}}).run_id != parse(optimizer=adamw).run_id


def test_memory_estimate_of_a_custom_optimizer_is_no_science() -> None:
    custom = {"name": "custom", "peak_lr": 0.1, "path": "torch.optim:Adagrad"}
    assert parse(optimizer=custom | {"state_numbers_each": 7}).run_id == parse(optimizer=custom).run_id


def test_ids_of_all_optimizers_are_frozen() -> None:
    """A new default, or a new field that is not marked ADDED_LATER, would orphan finished runs."""
    custom = {"path": "torch.optim:Adagrad"}
    ids = {
        name: parse(
            optimizer={"name": name, "peak_lr": 0.032, **(custom if name == "custom" else {})}
        ).run_id.rpartition("-")[2]
        for name in OPTIMIZERS
    }
    assert ids == FROZEN_IDS


FROZEN_IDS = {
    "adamw": "f266ec9c",
    "muon": "5caef8ba",
    "muon_plus": "7a084a74",
    "normuon": "a1582d0b",
    "orscale": "50acda98",
    "orscale_lm": "5b9d4543",
    "mona": "f31955bb",
    "scion": "dcd1c466",
    "lamb": "ba18d802",
    "lars": "4edf91fa",
    "sgd": "d3a0f445",
    "lion": "88d4afbd",
    "soap": "44d7a0f4",
    "custom": "6a08f296",
}


def test_optimizers_are_listed_with_what_each_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimizers", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["optimizers"]}
    assert list(listed) == list(OPTIMIZERS)
    state = {name: row["state_bytes_per_parameter"] for name, row in listed.items()}
    assert state == dict.fromkeys(OPTIMIZERS, 4.0) | {
        "adamw": 8.0, "lamb": 8.0, "mona": 8.0, "soap": 24.0, "custom": None,
        "normuon": 4 * (1 + 1 / 1024), "orscale_lm": 4 * (1 + 1 / 1024**2),
    }  # fmt: skip
    assert [name for name, row in listed.items() if row["experimental"]] == ["mona"]
    assert listed["muon"]["defaults"]["newton_schulz_form"] == "standard"
    assert all(row["source"] and row["summary"] for row in listed.values())
    assert main(["optimizers"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in OPTIMIZERS)


def test_listing_optimizers_loads_no_torch() -> None:
    code = "import sys; from sweeps.cli import main; main(['optimizers']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0

"""Singular values, ranks and sizes against torch.linalg, and those that a run records."""

import math
from pathlib import Path

import pytest
import torch

from harness.callbacks.diagnostics.diagnostics import momenta_of, spread_evenly
from harness.callbacks.diagnostics.spectra import (
    PERCENTILES,
    STATISTICS,
    singular_values,
    size_rows,
    spectrum,
    spectrum_rows,
)
from harness.optimizers.combined import build_optimizer
from harness.record import DIAGNOSTIC_COLUMNS, RunFolder, read_rows
from harness.train import train
from tests.runs import tiny_run
from tests.test_train import MACHINE

GROUPS = {"all": (0, 1, 2), "hidden": (0, 1), "norm": (2,)}


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 7), (7, 1)])
def test_singular_values_are_those_of_torch(shape: tuple[int, int]) -> None:
    own = matrix(*shape, seed=0)
    expected = torch.linalg.svdvals(own.double()).flip(0)
    assert torch.allclose(singular_values(own), expected, rtol=1e-6, atol=1e-6)


def test_spectrum_of_an_orthogonal_matrix_is_flat_and_of_full_rank() -> None:
    orthogonal, _ = torch.linalg.qr(matrix(12, 12, seed=1).double())
    assert spectrum(singular_values(3.0 * orthogonal)).tolist() == pytest.approx([1.0] * len(STATISTICS), rel=1e-6)


def test_spectrum_is_that_of_its_definitions() -> None:
    own = matrix(10, 30, seed=2).double()
    values = torch.linalg.svdvals(own)
    found = dict(zip(STATISTICS, spectrum(singular_values(own)).tolist(), strict=True))
    rms = float(torch.linalg.matrix_norm(own)) / math.sqrt(10)
    for percent in PERCENTILES:
        expected = float(torch.quantile(values, percent / 100)) / rms
        assert found[f"singular_value_p{percent}"] == pytest.approx(expected)
    assert found["stable_rank"] == pytest.approx(float(values.square().sum() / values[0] ** 2) / 10)
    shares = values / values.sum()
    assert found["effective_rank"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())) / 10)


def test_spectrum_of_one_direction_has_the_least_ranks() -> None:
    own = torch.outer(torch.arange(1.0, 7.0), torch.ones(5))
    found = dict(zip(STATISTICS, spectrum(singular_values(own)).tolist(), strict=True))
    assert found["stable_rank"] == pytest.approx(1 / 5)
    assert found["effective_rank"] == pytest.approx(1 / 5, rel=1e-3)


def test_rows_of_spectra_are_means_over_matrices_and_name_what_is_not_finite() -> None:
    statistics = {place: spectrum(singular_values(matrix(6, 6, seed=place))) for place in (0, 1)}
    rows = {
        row["group"]: row for row in spectrum_rows("update", statistics, GROUPS) if "stable" in str(row["quantity"])
    }
    place = STATISTICS.index("stable_rank")
    assert rows.keys() == {"hidden"}
    assert rows["hidden"]["value"] == pytest.approx(float(statistics[0][place] + statistics[1][place]) / 2)
    zero = {0: spectrum(singular_values(torch.zeros(6, 6)))}
    assert all((row["value"], row["reason"]) == (None, "not finite") for row in spectrum_rows("momentum", zero, GROUPS))


def test_sizes_are_root_mean_squares_and_the_largest_spectral_norms() -> None:
    update = [matrix(6, 9, seed=3), 4.0 * matrix(5, 5, seed=4), torch.full((4,), 0.5)]
    rows = {(row["quantity"], row["group"]): row["value"] for row in size_rows(update, GROUPS)}
    every = torch.cat([change.flatten() for change in update])
    assert rows["update_rms", "all"] == pytest.approx(float(every.square().mean().sqrt()))
    assert rows["update_rms", "norm"] == pytest.approx(0.5)
    assert rows["update_spectral_norm", "hidden"] == pytest.approx(float(torch.linalg.matrix_norm(update[1], 2)))
    assert ("update_spectral_norm", "norm") not in rows


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb", "lion", "scion", "normuon"])
def test_momenta_of_hidden_matrices_are_found_in_every_optimizer(text: Path, cache: Path, name: str) -> None:
    from harness.model import Transformer

    run = tiny_run(text, cache, optimizer={"name": name, "peak_lr": 0.01})
    network = Transformer(run.model)
    optimizer = build_optimizer(network, run.model, run.optimizer, run.global_batch_tokens)
    weights = list(network.parameters())
    assert momenta_of(optimizer, weights) == {}
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    momenta = momenta_of(optimizer, weights)
    assert all(momenta[place].shape == weight.shape for place, weight in enumerate(weights) if weight.ndim > 1)


def test_sequences_of_the_sharpness_are_spread_over_the_validation() -> None:
    batches = list(torch.arange(20).view(10, 2).split(4))
    assert spread_evenly(batches, 5)[:, 0].tolist() == [0, 4, 8, 12, 16]
    assert torch.equal(spread_evenly(batches, 10), torch.cat(batches))


def test_an_update_of_muon_is_nearly_orthogonal_and_its_momentum_is_not(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    run = tiny_run(text, cache, diagnostics={"spectra": True, "update_norms": True, "every_marks": 4})
    train(run, MACHINE, tmp_path, cache)
    rows = read_rows(RunFolder(tmp_path).diagnostics, DIAGNOSTIC_COLUMNS)
    last = {(row["quantity"], row["group"]): row["value"] for row in rows if row["step"] == run.steps}
    assert last["update_effective_rank", "mlp.up"] > 0.95
    assert last["momentum_effective_rank", "mlp.up"] < 0.8
    evaluations = read_rows(RunFolder(tmp_path).evaluations)
    assert last["update_rms", "hidden"] == pytest.approx(evaluations[-1]["update_rms_matrices"], rel=1e-5)

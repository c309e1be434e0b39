import math

import pytest
import torch

from pixelcnn import naive_sample, sample
from pixelcnn.training.optimizers import OPTIMIZERS, Optimizer, orthogonalise
from tests.core.tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (40, 3), (1, 7), (7, 1)])
def test_orthogonalise_levels_the_singular_values_and_keeps_the_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-6
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalise(matrix[None])[0] @ vh.T
    assert ((found.diagonal() > 0.4) & (found.diagonal() < 1.25)).all()
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-6


def test_each_matrix_is_orthogonalised_by_itself():
    matrices = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = torch.cat([orthogonalise(matrix[None]) for matrix in matrices])
    assert (orthogonalise(matrices * torch.tensor([1.0, 1e-6, 1e3])[:, None, None]) - alone).abs().max() < 1e-3


def test_no_gradient_is_no_direction():
    assert (orthogonalise(torch.zeros(1, 3, 4)) == 0).all()


@pytest.mark.parametrize("norm", [1e-19, 1e-21, 1e-30, 1e-40])  # their squares are no float32 any more
def test_a_gradient_of_nearly_nothing_moves_next_to_nothing(norm):
    """Where a part of a network has died: weights went to infinity."""
    found = orthogonalise(torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0)) * norm)
    assert (found.abs() < 1e-3).all()


def test_muon_looks_ahead_by_nesterovs_momentum():
    weight = torch.nn.Parameter(torch.zeros(2, 3, 1, 1, dtype=torch.float64))
    optimizer = Optimizer(torch.nn.ParameterList([weight, torch.zeros(2)]), "muon", {})
    gradients = torch.randn(2, *weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, momentum = torch.zeros_like(weight), torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = 0.95 * momentum + 0.05 * gradient
        expected -= 0.01 * 0.2 * 3**0.5 * orthogonalise(ahead.flatten(1)[None]).view_as(weight)
        weight.grad = gradient.clone()
        optimizer.step(0.01)
    torch.testing.assert_close(weight.detach(), expected.detach())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_weight_is_followed_by_one_part(architecture):
    model = tiny_model(architecture, (1, 3, 3), 2, num_labels=2)
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    for w in model.parameters():
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=w.dtype)
    optimizer = Optimizer(model, "muon", {})
    optimizer.step(0.01)
    for name, w in model.named_parameters():
        moved = (w.detach() - before[name]).square().mean().sqrt().item()
        if w.dim() == 4:
            assert list(optimizer.state(w)) == ["momentum"]
            rank, largest = min(w.flatten(1).shape), max(w.flatten(1).shape)
            assert moved == pytest.approx(0.01 * 0.2 * math.sqrt(largest * rank / w.numel()), rel=0.3), name
        else:
            assert "exp_avg_sq" in optimizer.state(w)
            assert moved == pytest.approx(0.01, rel=1e-3), "Adam's first step is as large as its rate"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_each_step_the_sampler_is_that_of_the_new_weights(name):
    """It keeps what it has laid out as long as torch counts no change of a weight."""
    model = tiny_model("gated_pixelcnn", (1, 3, 3), 4)
    optimizer, u = Optimizer(model, name, {}), torch.rand(8, 1, 3, 3, dtype=torch.float64)
    for number in range(4):
        for w in model.parameters():
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(number), dtype=w.dtype)
        optimizer.step(0.2)
        assert torch.equal(sample(model, u), naive_sample(model, u))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_restored_goes_on_alike(name):
    def steps(model, optimizer, numbers):
        for number in numbers:
            for w in model.parameters():
                w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(number), dtype=w.dtype)
            optimizer.step(0.01)

    models = [tiny_model("gated_pixelcnn", (1, 3, 3), 2, num_labels=2) for _ in range(2)]
    optimizers = [Optimizer(model, name, {}) for model in models]
    steps(models[0], optimizers[0], range(3))
    models[1].load_state_dict(models[0].state_dict())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        optimizers[1].restore(b, {k: v.clone() for k, v in optimizers[0].state(a).items()})
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_the_memory_of_another_optimizer_is_left_out():
    model = tiny_model("pixelcnn", (1, 3, 3), 2)
    adam, muon = (Optimizer(model, name, {}) for name in OPTIMIZERS)
    for w in model.parameters():
        w.grad = torch.ones_like(w)
    adam.step(0.01)
    for w in model.parameters():
        muon.restore(w, adam.state(w))
        assert bool(muon.state(w)) == (w.dim() != 4)

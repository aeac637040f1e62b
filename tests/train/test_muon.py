"""Muon in float32 beside torch's, and its orthogonalisation beside the definition."""

import pytest
import torch

from sbp_fast.train.muon import Float32Muon, orthogonalize

COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_orthogonalize_maps_the_singular_values_by_the_polynomial(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    for _ in range(5):
        values = COEFFICIENTS[0] * values + COEFFICIENTS[1] * values**3 + COEFFICIENTS[2] * values**5
    expected = left @ values.diag() @ right
    assert (orthogonalize(matrix, COEFFICIENTS, 5, 1e-7) - expected).abs().max() < 1e-12
    rounded = orthogonalize(matrix.float(), COEFFICIENTS, 5, 1e-7)
    assert (rounded - expected).abs().max() < 2e-5 and (values - 1).abs().max() < 0.4


def test_steps_agree_with_those_of_torch_but_for_its_bfloat16() -> None:
    torch.manual_seed(0)
    start = [torch.randn(24, 64), torch.randn(64, 24), torch.randn(16, 16)]
    gradients = [[torch.randn_like(x) for x in start] for _ in range(4)]
    options = {"lr": 0.02, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}
    ends = []
    for kind in (torch.optim.Muon, Float32Muon):
        parameters = [x.clone().requires_grad_() for x in start]
        optimizer = kind(parameters, **options)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameters)
    for first, theirs, mine in zip(start, *ends, strict=True):
        moved = (theirs - first).norm()
        assert 0 < (mine - theirs).norm() < 0.02 * moved

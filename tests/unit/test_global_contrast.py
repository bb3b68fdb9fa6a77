"""The global estimator, against a float64 loop; with nothing remembered it is InfoNCE."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.global_contrast import SampleMeans, global_info_nce
from pretrain.losses import info_nce

SET = 20


def rows(n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        F.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=-1)
        .to(dtype)
        .requires_grad_()
    )


def test_with_gamma_1_it_is_info_nce():
    a, b, scale = rows(6, 0), rows(6, 1), torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([3, 19, 0, 7, 11, 5])
    found = []
    for loss in (
        lambda *x: info_nce(*x),
        lambda *x: global_info_nce(*x, indices, SampleMeans(SET).double(), gamma=1.0),
    ):
        value = loss(a, b, scale)
        found.append((value.detach(), *torch.autograd.grad(value, (a, b, scale))))
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_averages_and_gradient_are_the_loop():
    """Two steps with overlapping samples: u <- (1 - gamma) u + gamma g; weights 1 / (u + floor)."""
    gamma, floor, scale, n = 0.3, 0.05, 8.0, 4
    means = SampleMeans(SET).double()
    remembered: list[dict[int, float]] = [{}, {}]
    for step, indices in enumerate(([3, 9, 1, 4], [4, 3, 12, 0])):
        a, b = rows(n, 10 + step), rows(n, 20 + step)
        value = global_info_nce(
            a,
            b,
            torch.tensor(scale, dtype=torch.float64),
            torch.tensor(indices),
            means,
            gamma=gamma,
            floor=floor,
        )
        value.backward()
        expected_a, expected_b = torch.zeros_like(a), torch.zeros_like(b)
        for u, x, y, by_x, by_y in (
            (remembered[0], a.detach(), b.detach(), expected_a, expected_b),
            (remembered[1], b.detach(), a.detach(), expected_b, expected_a),
        ):
            for i in range(n):
                terms = {
                    j: math.exp(scale * float(x[i] @ (y[j] - y[i]))) / (n - 1) for j in range(n) if j != i
                }
                g = sum(terms.values())
                u[indices[i]] = (1 - gamma) * u[indices[i]] + gamma * g if indices[i] in u else g
                weight = scale / (u[indices[i]] + floor) / (2 * n)
                for j, term in terms.items():
                    by_x[i] += weight * term * (y[j] - y[i])
                    by_y[j] += weight * term * x[i]
                    by_y[i] -= weight * term * x[i]
        torch.testing.assert_close(a.grad, expected_a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b.grad, expected_b, rtol=1e-9, atol=1e-12)
    for u, kept in zip(remembered, (means.image, means.text), strict=True):
        seen = sorted(u)
        torch.testing.assert_close(kept[seen].exp(), torch.tensor([u[i] for i in seen], dtype=torch.float64))
        assert bool(kept[[i for i in range(SET) if i not in u]].isnan().all())
    assert set(means.state_dict()) == {"image", "text"}


def test_scale_100_is_finite_in_float32():
    a = rows(6, 0, torch.float32)
    means = SampleMeans(SET)
    for texts in (-a.detach(), a.detach()):  # exp(200), then exp(-100)
        value = global_info_nce(a, texts, torch.tensor(100.0), torch.arange(6), means, gamma=0.5)
        value.backward()
        assert bool(torch.isfinite(value))
        assert a.grad is not None
        assert bool(torch.isfinite(a.grad).all())


def test_what_does_not_fit_is_refused():
    a, scale, means = rows(3, 0), torch.tensor(1.0), SampleMeans(SET)
    with pytest.raises(ValueError, match="expected 0 < gamma <= 1, got 0"):
        global_info_nce(a, a, scale, torch.arange(3), means, gamma=0)
    with pytest.raises(ValueError, match=r"one index below 20 for each of 3 pairs, got .* from 18 to 20"):
        global_info_nce(a, a, scale, torch.arange(18, 21), means, gamma=1.0)
    with pytest.raises(ValueError, match="a single pair has nothing to be contrasted with"):
        global_info_nce(a[:1], a[:1], scale, torch.arange(1), means, gamma=1.0)

"""InfoNCE in one process, against a float64 loop over the pairs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.losses import distributed_info_nce, info_nce


def reference(images: torch.Tensor, texts: torch.Tensor, scale: float):
    """Loss and gradients by the formulas, one pair at a time.

    With z_ij = S a_i . b_j: L = 1/2N sum_i (lse_j z_ij + lse_j z_ji - 2 z_ii), g_ij = dL/dz_ij.
    """
    n, a, b = len(images), images.tolist(), texts.tolist()
    z = [[scale * sum(x * y for x, y in zip(a[i], b[j], strict=True)) for j in range(n)] for i in range(n)]

    def lse(values):
        top = max(values)
        return top + math.log(sum(math.exp(value - top) for value in values))

    rows = [lse(z[i]) for i in range(n)]
    columns = [lse([z[i][j] for i in range(n)]) for j in range(n)]
    loss = sum(rows[i] + columns[i] - 2 * z[i][i] for i in range(n)) / (2 * n)
    g = [
        [
            (math.exp(z[i][j] - rows[i]) + math.exp(z[i][j] - columns[j]) - 2 * (i == j)) / (2 * n)
            for j in range(n)
        ]
        for i in range(n)
    ]
    d = len(a[0])
    by_image = [[scale * sum(g[i][j] * b[j][k] for j in range(n)) for k in range(d)] for i in range(n)]
    by_text = [[scale * sum(g[i][j] * a[i][k] for i in range(n)) for k in range(d)] for j in range(n)]
    by_scale = sum(g[i][j] * z[i][j] / scale for i in range(n) for j in range(n))
    return (
        loss,
        torch.tensor(by_image, dtype=torch.float64),
        torch.tensor(by_text, dtype=torch.float64),
        by_scale,
    )


def features(n: int, d: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [
        F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()
        for _ in range(2)
    ]
    return made[0], made[1]


@pytest.mark.parametrize("loss", [info_nce, distributed_info_nce])
@pytest.mark.parametrize(("n", "scale"), [(1, 14.3), (2, 1.0), (5, 14.3), (9, 100.0)])
def test_value_and_gradients_are_those_of_the_loop(loss, n, scale):
    images, texts = features(n)
    temperature = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    value = loss(images, texts, temperature)
    value.backward()
    expected, by_image, by_text, by_scale = reference(images.detach(), texts.detach(), scale)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-13)
    torch.testing.assert_close(images.grad, by_image, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(texts.grad, by_text, rtol=1e-9, atol=1e-12)
    assert temperature.grad is not None
    assert float(temperature.grad) == pytest.approx(by_scale, rel=1e-9, abs=1e-12)


def test_gradients_pass_gradcheck():
    images, texts = features(4)
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(info_nce, (images, texts, scale))


def test_it_is_finite_where_exp_would_overflow():
    rows = F.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)  # exp(100) is infinite in float32
    loss = info_nce(rows, -rows, scale)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert rows.grad is not None
    assert bool(torch.isfinite(rows.grad).all())


def test_a_model_that_knows_nothing_is_at_ln_n():
    rows = torch.ones(32, 4) / 2
    assert float(info_nce(rows, rows, torch.tensor(14.3))) == pytest.approx(math.log(32), rel=1e-6)


@pytest.mark.parametrize("loss", [info_nce, distributed_info_nce])
def test_unequal_shapes_are_refused(loss):
    with pytest.raises(ValueError, match=r"same shape \(b, d\), got \(3, 4\) and \(2, 4\)"):
        loss(torch.ones(3, 4), torch.ones(2, 4), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"got \(4,\) and \(4,\)"):
        loss(torch.ones(4), torch.ones(4), torch.tensor(1.0))

"""InfoNCE and the sigmoid loss in one process, against float64 loops over the pairs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain import blocks
from pretrain.exchange import open_exchange
from pretrain.losses import (
    distributed_info_nce,
    distributed_sigmoid_loss,
    info_nce,
    sigmoid_loss,
    smoothing_term,
)

TILES = (None, 1, 3, 4, 100)  # with 9 pairs: whole, one logit, even, uneven, wider than the batch


def reference(images: torch.Tensor, texts: torch.Tensor, scale: float, smoothing: float = 0.0):
    """Loss and gradients by the formulas, one pair at a time.

    With z_ij = S a_i . b_j: L = 1/2N sum_i (lse_j z_ij + lse_j z_ji - 2 z_ii), g_ij = dL/dz_ij. Smoothed labels
    have (1 - e) + e / N on the pair and e / N elsewhere.
    """
    n, a, b = len(images), images.tolist(), texts.tolist()
    z = [[scale * sum(x * y for x, y in zip(a[i], b[j], strict=True)) for j in range(n)] for i in range(n)]
    label = [[(1 - smoothing) * (i == j) + smoothing / n for j in range(n)] for i in range(n)]

    def lse(values):
        top = max(values)
        return top + math.log(sum(math.exp(value - top) for value in values))

    rows = [lse(z[i]) for i in range(n)]
    columns = [lse([z[i][j] for i in range(n)]) for j in range(n)]
    loss = (sum(rows) + sum(columns)) / (2 * n)
    loss -= sum(label[i][j] * z[i][j] for i in range(n) for j in range(n)) / n
    g = [
        [
            (math.exp(z[i][j] - rows[i]) + math.exp(z[i][j] - columns[j]) - 2 * label[i][j]) / (2 * n)
            for j in range(n)
        ]
        for i in range(n)
    ]
    return loss, *by_inputs(g, z, a, b, scale)


def sigmoid_reference(images: torch.Tensor, texts: torch.Tensor, scale: float, bias: float):
    """L = -1/N sum_ij log sigmoid(y_ij (S a_i . b_j + bias)), and its gradients."""
    n, a, b = len(images), images.tolist(), texts.tolist()
    z = [[scale * sum(x * y for x, y in zip(a[i], b[j], strict=True)) for j in range(n)] for i in range(n)]
    y = [[1 if i == j else -1 for j in range(n)] for i in range(n)]
    wrong = [[-y[i][j] * (z[i][j] + bias) for j in range(n)] for i in range(n)]
    loss = sum(max(x, 0) + math.log1p(math.exp(-abs(x))) for row in wrong for x in row) / n
    g = [[-y[i][j] / (1 + math.exp(-wrong[i][j])) / n for j in range(n)] for i in range(n)]
    return loss, *by_inputs(g, z, a, b, scale), sum(map(sum, g))


def by_inputs(g, z, a, b, scale):
    """From dL/dz to the gradients by image features, text features and scale."""
    n, d = len(a), len(a[0])
    by_image = [[scale * sum(g[i][j] * b[j][k] for j in range(n)) for k in range(d)] for i in range(n)]
    by_text = [[scale * sum(g[i][j] * a[i][k] for i in range(n)) for k in range(d)] for j in range(n)]
    by_scale = sum(g[i][j] * z[i][j] / scale for i in range(n) for j in range(n))
    wide = {"dtype": torch.float64}
    return torch.tensor(by_image, **wide), torch.tensor(by_text, **wide), by_scale


def features(
    n: int, d: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [
        F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)
        .to(dtype)
        .requires_grad_()
        for _ in range(2)
    ]
    return made[0], made[1]


def scalar(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("loss", [info_nce, distributed_info_nce])
@pytest.mark.parametrize(("n", "scale"), [(1, 14.3), (2, 1.0), (5, 14.3), (9, 100.0)])
def test_info_nce_is_the_loop(loss, n, scale, tile):
    images, texts = features(n)
    temperature = scalar(scale)
    value = loss(images, texts, temperature, tile=tile)
    (2 * value).backward()
    expected, by_image, by_text, by_scale = reference(images.detach(), texts.detach(), scale)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-13)
    torch.testing.assert_close(images.grad, 2 * by_image, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(texts.grad, 2 * by_text, rtol=1e-9, atol=1e-12)
    assert temperature.grad is not None
    assert float(temperature.grad) == pytest.approx(2 * by_scale, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("loss", [sigmoid_loss, distributed_sigmoid_loss])
@pytest.mark.parametrize(("n", "scale", "bias"), [(1, 10.0, -10.0), (5, 10.0, -10.0), (9, 100.0, 3.0)])
def test_the_sigmoid_loss_is_the_loop(loss, n, scale, bias, tile):
    images, texts = features(n)
    temperature, offset = scalar(scale), scalar(bias)
    value = loss(images, texts, temperature, offset, tile=tile)
    (2 * value).backward()
    expected, *gradients = sigmoid_reference(images.detach(), texts.detach(), scale, bias)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-13)
    for tensor, gradient in zip((images, texts, temperature, offset), gradients, strict=True):
        torch.testing.assert_close(
            tensor.grad, 2 * torch.as_tensor(gradient, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )
    with torch.no_grad():  # another path: no gradient is found on the way
        assert torch.equal(loss(images, texts, temperature, offset, tile=tile), value.detach())


@pytest.mark.parametrize("tile", [None, 4])
def test_smoothed_labels_are_the_loop(tile):
    images, texts = features(9)
    temperature = scalar(14.3)
    value = info_nce(images, texts, temperature, tile=tile) + 0.1 * smoothing_term(images, texts, temperature)
    value.backward()
    expected, by_image, by_text, by_scale = reference(images.detach(), texts.detach(), 14.3, 0.1)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(images.grad, by_image, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(texts.grad, by_text, rtol=1e-9, atol=1e-12)
    assert temperature.grad is not None
    assert float(temperature.grad) == pytest.approx(by_scale, rel=1e-9)


@pytest.mark.parametrize("tile", [None, 3])
def test_gradients_pass_gradcheck(tile):
    images, texts = features(4)
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, tile=tile), (images, texts, scalar(14.3)))
    assert torch.autograd.gradcheck(
        lambda *x: sigmoid_loss(*x, tile=tile), (images, texts, scalar(14.3), scalar(-2.0))
    )


@pytest.mark.parametrize("direction", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("tile", [None, 3])
def test_scale_100_in_float32_is_finite_and_right(tile, direction):
    """exp(100) is infinite in float32: aligned pairs, opposite ones and unrelated ones."""
    images, texts = features(8, 4, dtype=torch.float32)
    rows = direction * images.detach() if direction else texts.detach()
    wide = reference(images.detach().double(), rows.double(), 100.0)
    scale = scalar(100.0, torch.float32)
    loss = info_nce(images, rows, scale, tile=tile)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wide[0], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(images.grad.double(), wide[1], rtol=1e-4, atol=1e-4)  # pyright: ignore
    images.grad = None
    sigmoid_loss(images, rows, scale, scalar(-10.0, torch.float32), tile=tile).backward()
    expected = sigmoid_reference(images.detach().double(), rows.double(), 100.0, -10.0)
    torch.testing.assert_close(images.grad.double(), expected[1], rtol=1e-4, atol=1e-4)  # pyright: ignore


def test_the_tiled_float32_gradient_is_as_near_to_the_truth_as_the_dense_one():
    """Aligned pairs at scale 100: 1 - p must not drown in the rounding of a logit of 100."""
    apart = {}
    for tile in (None, 16):
        images, noise = features(64, 32, dtype=torch.float32)
        texts = F.normalize(images.detach() + 0.15 * noise.detach(), dim=-1)
        info_nce(images, texts, scalar(100.0, torch.float32), tile=tile).backward()
        found = images.grad
        truth = images.detach().double().requires_grad_()
        info_nce(truth, texts.double(), scalar(100.0)).backward()
        assert found is not None
        assert truth.grad is not None
        apart[tile] = float((found - truth.grad).norm() / truth.grad.norm())
    assert apart[16] < 2 * apart[None] < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", [None, 4])
def test_half_precision_features_are_summed_in_float32(dtype, tile):
    images, texts = features(9, dtype=dtype)
    wide = [tensor.detach().float().requires_grad_() for tensor in (images, texts)]
    for loss, more in ((info_nce, ()), (sigmoid_loss, (torch.tensor(-10.0),))):
        expected = loss(*wide, torch.tensor(14.3), *more, tile=tile)
        value = loss(images, texts, torch.tensor(14.3), *more, tile=tile)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)
        value.backward()
        assert images.grad is not None
        assert images.grad.dtype == dtype
        images.grad = None


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    """Whatever is allocated in both passes is a block, a side's rows or smaller."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    images, texts = features(64, 4, dtype=torch.float32)
    for loss, more in ((info_nce, ()), (sigmoid_loss, (torch.tensor(-10.0),))):
        with Watch():
            loss(images, texts, torch.tensor(14.3), *more, tile=8).backward()
    assert largest == 64 * 4 * 4  # features; two blocks have 2 * 8 * 8 * 4 bytes
    with Watch():
        info_nce(images, texts, torch.tensor(14.3)).backward()
    assert largest == 64 * 64 * 4


def test_above_a_million_logits_blocks_are_taken(monkeypatch):
    monkeypatch.setattr("pretrain.losses.DENSE_LOGITS", 80)
    monkeypatch.setattr(blocks, "CPU_TILE", (4, 5))
    images, texts = features(9)
    value = info_nce(images, texts, scalar(14.3))
    assert type(value.grad_fn).__name__ == "InfoNCEBackward"
    value.backward()
    expected, by_image, *_ = reference(images.detach(), texts.detach(), 14.3)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(images.grad, by_image, rtol=1e-9, atol=1e-12)
    assert blocks.block_sides(None, torch.device("cuda")) == blocks.GPU_TILE


def test_a_model_that_knows_nothing_is_at_ln_n():
    rows = torch.ones(32, 4) / 2
    assert float(info_nce(rows, rows, torch.tensor(14.3))) == pytest.approx(math.log(32), rel=1e-6)
    assert float(info_nce(rows, rows, torch.tensor(14.3), tile=8)) == pytest.approx(math.log(32), rel=1e-6)


def test_a_scale_of_one_element_will_do():
    images, texts = features(5)
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    (info_nce(images, texts, scale, tile=2) + sigmoid_loss(images, texts, scale, bias)).backward()
    assert scale.grad is not None
    assert bias.grad is not None
    assert scale.grad.shape == bias.grad.shape == (1,)


@pytest.mark.parametrize("loss", [info_nce, distributed_info_nce, smoothing_term])
def test_unequal_shapes_are_refused(loss):
    with pytest.raises(ValueError, match=r"same shape \(b, d\), got \(3, 4\) and \(2, 4\)"):
        loss(torch.ones(3, 4), torch.ones(2, 4), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"got \(4,\) and \(4,\)"):
        loss(torch.ones(4), torch.ones(4), torch.tensor(1.0))


@pytest.mark.parametrize("loss", [sigmoid_loss, distributed_sigmoid_loss])
def test_unequal_shapes_are_refused_by_the_sigmoid_loss(loss):
    with pytest.raises(ValueError, match=r"same shape \(b, d\), got \(3, 4\) and \(2, 4\)"):
        loss(torch.ones(3, 4), torch.ones(2, 4), torch.tensor(1.0), torch.tensor(0.0))


def test_a_tile_and_an_exchange_that_cannot_be_are_refused():
    rows = torch.eye(4)
    with pytest.raises(ValueError, match=r"a tile of at least 1 row, or None .*, got 0"):
        info_nce(rows, rows, torch.tensor(1.0), tile=0)
    with pytest.raises(ValueError, match="expected exchange 'gather' or 'ring', got 'star'"):
        open_exchange("star", 4, rows.device)  # pyright: ignore[reportArgumentType]

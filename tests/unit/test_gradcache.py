"""GradCache: the gradient of the undivided batch, random layers included."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pretrain.gradcache as module
from pretrain.gradcache import cached_backward, require_row_by_row
from pretrain.losses import info_nce, sigmoid_loss


class Network(nn.Module):
    """Two towers with dropout, and both scalars."""

    def __init__(self, dropout: float):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            nn.Sequential(
                nn.Linear(5, 16, dtype=torch.float64),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(16, 6, dtype=torch.float64),
            )
            for _ in range(2)
        )
        self.t = nn.Parameter(torch.tensor(2.3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-5.0, dtype=torch.float64))
        self.most = 0

    def forward(self, images, texts):
        if torch.is_grad_enabled():
            self.most = max(self.most, len(images))
        rows = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return *rows, self.t.exp(), self.bias


def inputs(rows: int = 11):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(rows, 5, generator=generator, dtype=torch.float64) for _ in range(2))


def loss(features):
    return info_nce(*features[:3]) + sigmoid_loss(*features)


def undivided(network: Network, micro_batch: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All activations at once; the rows go through the random layers in the same parts."""
    parts = [network(*part) for part in zip(*(tensor.split(micro_batch) for tensor in inputs()), strict=True)]
    images, texts = (torch.cat([part[number] for part in parts]) for number in (0, 1))
    value = loss((images, texts, network.t.exp(), network.bias))
    value.backward()
    return value.detach(), gradients(network)


def gradients(network: Network) -> dict[str, torch.Tensor]:
    found = {name: value.grad.clone() for name, value in network.named_parameters()}  # pyright: ignore
    network.zero_grad()
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch", [1, 4, 11, 50])
def test_gradients_are_those_of_the_undivided_batch(micro_batch, dropout):
    network = Network(dropout)
    torch.manual_seed(7)
    expected, by_parameter = undivided(network, micro_batch)
    state = torch.get_rng_state()
    network.most = 0
    torch.manual_seed(7)
    value = cached_backward(network, inputs(), loss, micro_batch=micro_batch)
    assert torch.equal(torch.get_rng_state(), state)  # what follows draws the same numbers
    assert network.most == min(micro_batch, 11)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, by_parameter[name], rtol=1e-9, atol=1e-12, msg=name)


def test_without_replayed_random_numbers_the_gradient_is_another(monkeypatch):
    """That the comparison above can fail."""
    network = Network(0.5)
    torch.manual_seed(7)
    _, expected = undivided(network, 4)
    monkeypatch.setattr(module, "set_random_state", lambda *_: None)
    torch.manual_seed(7)
    cached_backward(network, inputs(), loss, micro_batch=4)
    came = gradients(network)["image.0.weight"]
    assert float(torch.cosine_similarity(came.flatten(), expected["image.0.weight"].flatten(), dim=0)) < 0.9


def test_the_loss_may_be_scaled():
    network = Network(0.0)
    _, expected = undivided(network, 4)
    cached_backward(network, inputs(), loss, micro_batch=4, backward=lambda value: (8 * value).backward())
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, 8 * expected[name], rtol=1e-9, atol=1e-12)


def test_what_the_loss_drew_is_not_drawn_again():
    """The random numbers go on where the loss left them, not where the second pass did."""
    drawn = []

    def noisy(features):
        drawn.append(torch.rand(3))
        return loss(features)

    torch.manual_seed(7)
    cached_backward(Network(0.0), inputs(), noisy, micro_batch=4)
    assert not torch.equal(torch.rand(3), drawn[0])


@pytest.mark.parametrize("passes", [0, 3, 5])
def test_a_rank_of_fewer_parts_calls_the_network_as_often_as_the_others(passes):
    """Under FSDP2 each call gathers weights; those that are made up have no gradient and hold back the exchange."""
    network = Network(0.0)
    _, expected = undivided(network, 4)
    calls, held = [], []
    network.register_forward_pre_hook(lambda *_: calls.append((torch.is_grad_enabled(), bool(held))))

    @contextmanager
    def no_sync():
        held.append(None)
        yield
        held.pop()

    cached_backward(network, inputs(), loss, micro_batch=4, no_sync=no_sync, passes=passes)
    times = max(passes, 3)
    assert calls == [(False, True)] * times + [(True, True)] * (times - 1) + [(True, False)]
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_batch_statistics_and_empty_parts_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"micro_batch: 1 is a BatchNorm2d: .*lock this one"):
        require_row_by_row(model)
    require_row_by_row(model.eval())
    with pytest.raises(ValueError, match="micro_batch of at least 1 row, got 0"):
        cached_backward(Network(0.0), inputs(), loss, micro_batch=0)

"""Batch norm over ranks: in a group of one it must be torch's own, value, gradient and statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

import pretrain.norm as norm
from pretrain.norm import GlobalBatchNorm2d, GlobalBatchNormAct2d, use_global_batch_norm


@pytest.fixture
def alone(tmp_path):
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(layer: nn.Module, pixels: torch.Tensor, steps: int = 2):
    outputs = []
    for step in range(steps):
        inputs = (pixels + step).requires_grad_()
        output = layer(inputs)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        outputs += [output.detach(), inputs.grad]
    return outputs + [parameter.grad for parameter in layer.parameters()] + list(layer.buffers())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.usefixtures("alone")
def test_alone_it_is_the_ordinary_batch_norm(kind, momentum):
    torch.manual_seed(0)
    plain = kind(5, momentum=momentum).double()
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    ours = copy.deepcopy(plain)
    ours.__class__ = norm.GLOBAL[kind]
    pixels = 3 + torch.randn(4, 5, 3, 2, dtype=torch.float64)
    for expected, came in zip(run(plain, pixels), run(ours, pixels), strict=True):
        torch.testing.assert_close(came, expected, rtol=1e-10, atol=1e-12)
    plain.eval()
    ours.eval()
    torch.testing.assert_close(ours(pixels), plain(pixels), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("alone")
def test_half_precision_keeps_statistics_in_float32():
    """1,024 rows of 7 x 7 are 50,176 values, which bf16 cannot even count."""
    torch.manual_seed(0)
    pixels = (10 + torch.randn(1024, 3, 7, 7)).bfloat16()
    layer = GlobalBatchNorm2d(3, momentum=1.0)
    output = layer(pixels)
    assert output.dtype == torch.bfloat16
    wide = pixels.double()
    mean, variance = layer.state_dict()["running_mean"], layer.state_dict()["running_var"]
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(variance.double(), wide.var((0, 2, 3)), rtol=1e-4, atol=0)


def test_one_process_keeps_its_layers():
    model = nn.Sequential(nn.BatchNorm2d(2))
    assert use_global_batch_norm(model) == 0
    assert type(model[0]) is nn.BatchNorm2d


def test_all_known_layers_change_and_keep_their_names(monkeypatch):
    monkeypatch.setattr(norm.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(norm.dist, "get_world_size", lambda: 2)
    model = nn.Sequential(nn.BatchNorm2d(2), BatchNormAct2d(2), nn.LayerNorm(2))
    names = list(model.state_dict())
    assert use_global_batch_norm(model) == 2
    assert [type(layer) for layer in model] == [GlobalBatchNorm2d, GlobalBatchNormAct2d, nn.LayerNorm]
    assert list(model.state_dict()) == names
    assert use_global_batch_norm(model) == 0  # a second call finds nothing to do
    with pytest.raises(TypeError, match=r"0: a BatchNorm1d takes its statistics from one rank only"):
        use_global_batch_norm(nn.Sequential(nn.BatchNorm1d(2)))

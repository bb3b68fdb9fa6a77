"""Accumulation for contrastive batches: open_clip's own loop and ours, beside the gradient of the undivided batch."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss

from pretrain.encoder import build_encoder
from pretrain.gradcache import cached_backward
from pretrain.losses import info_nce
from pretrain.network import DualEncoder
from pretrain.recipe_model import TowersModel

pytestmark = pytest.mark.parity
PARTS, ROWS = 4, 3
RATE = 0.01  # small, or its clamp of logit_scale would be in the change


@pytest.fixture
def parts(tiny_models):
    """`parts() -> network, images, tokens`: the same weights each time, in float64."""

    def make():
        torch.manual_seed(0)
        encoder = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu")
        generator = torch.Generator().manual_seed(0)
        size = (PARTS * ROWS, 3, *encoder.image_size)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        tokens = encoder.tokenize([f"{number} things" for number in range(len(images))])
        return DualEncoder(encoder).double(), images, tokens

    return make


class Loader(list):
    """Batches with the counts that open_clip's loop asks for."""

    num_batches = PARTS
    num_samples = PARTS * ROWS


def after_a_step_of_open_clip(
    network: Any, images: torch.Tensor, tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The gradient that its trainer steps with, from what plain descent changes."""
    train = pytest.importorskip("open_clip_train.train")
    model = network.model
    model.output_dict = True
    pixels = network.normalize(images).double()
    batches = Loader(zip(pixels.split(ROWS), tokens.split(ROWS), strict=True))
    keys = ("world_size", "batch_size", "log_every_n_steps")
    args = Namespace(
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=PARTS,
        skip_scheduler=True,
        grad_clip_norm=None,
    )
    args = Namespace(**vars(args), **dict.fromkeys(keys, 1), horovod=False, rank=0, local_rank=0, wandb=False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    data = {"train": Namespace(dataloader=batches, set_epoch=lambda epoch: None)}
    train.train_one_epoch(model, data, ClipLoss(), 0, optimizer, None, None, None, args)
    return {name: (before[name] - value.detach()) / RATE for name, value in model.named_parameters()}


def test_open_clip_multiplies_the_temperatures_gradient_by_the_number_of_parts(parts):
    """Its towers get the gradient of the undivided batch, its logit_scale that many times; here all get it once."""
    network, images, tokens = parts()
    info_nce(*network(images, tokens)).backward()
    truth = {name: value.grad for name, value in network.model.named_parameters()}
    theirs = after_a_step_of_open_clip(*parts())
    network, images, tokens = parts()
    cached_backward(network, (images, tokens), lambda features: info_nce(*features), micro_batch=ROWS)
    ours = {name: value.grad for name, value in network.model.named_parameters()}
    assert float(truth["logit_scale"].abs()) > 1e-3
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12)
        factor = PARTS if name == "logit_scale" else 1
        torch.testing.assert_close(theirs[name], factor * expected, rtol=1e-6, atol=1e-9)

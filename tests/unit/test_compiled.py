"""`compile: true`: the eager run's numbers, names and checkpoints."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pretrain.compiled import compile_network, require_compiler, sizes_vary
from pretrain.encoder import load_encoder
from pretrain.gradcache import cached_backward
from pretrain.losses import info_nce
from pretrain.network import DualEncoder
from pretrain.recipe import PretrainRecipe
from pretrain.resolution import set_patch_dropout
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_without_a_compiler_it_is_refused(tiny_recipe, monkeypatch):
    from torch._inductor import config

    said = r"needs a C\+\+ compiler, and none of these runs here: no-such-compiler\. Install one"
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(ValueError, match=said):
        Trainer(PretrainRecipe.model_validate(tiny_recipe(compile=True)))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    require_compiler(torch.device("cpu"))
    with pytest.raises(ValueError, match="on a GPU needs Triton"):
        require_compiler(torch.device("cuda"))


def pairs(encoder, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (rows, 3, *encoder.image_size), dtype=torch.uint8, generator=generator)
    return images, encoder.tokenize([f"picture {number}" for number in range(rows)])


@pytest.mark.slow
def test_gradients_are_the_eager_ones_and_gradcache_replays_its_random_numbers(small_encoder):
    encoder = small_encoder()
    network = DualEncoder(encoder)
    names = list(network.state_dict())
    encoder.model.train()

    def gradients(batch, backward=None) -> dict[str, torch.Tensor]:
        network.zero_grad()
        sizes_vary(*batch)
        torch.manual_seed(3)
        backward(batch) if backward else info_nce(*network(*batch)).backward()
        return {
            name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None
        }

    def agree(came, expected, tolerance):
        for name, value in expected.items():
            assert float((came[name] - value).norm()) <= tolerance * float(value.norm()) + 1e-7, name

    eager = {rows: gradients(pairs(encoder, rows)) for rows in (8, 5)}
    compile_network(network, torch.device("cpu"))
    assert list(network.state_dict()) == names
    for rows, expected in eager.items():  # the second with the kernels of the first
        agree(gradients(pairs(encoder, rows)), expected, 1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0

    # Patch dropout: the features of both passes must be of the same patches.
    set_patch_dropout(encoder.model.visual, 0.5)
    compile_network(network, torch.device("cpu"))
    seen: list[torch.Tensor] = []

    def watched(*part):
        sizes_vary(*part)
        features = network(*part)
        seen.append(features[0].detach().clone())
        return features

    def cached(batch):
        cached_backward(watched, batch, lambda features: info_nce(*features), micro_batch=4, compiled=True)

    gradients(pairs(encoder, 8), cached)
    for first, second in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one_and_resumes_bit_for_bit(
    tiny_recipe, tmp_path, fresh_accelerate, same, weights_of
):
    """An epoch's end (40 pairs in batches of 12), pictures of two sizes, an evaluation between."""

    def train(name: str, *, resume: bool = False, **keys) -> Trainer:
        fresh_accelerate()
        phases = [{"image_size": 16}, {"step": 3}]
        content = tiny_recipe(run=str(tmp_path / name), batch_size=12, steps=6, phases=phases, **keys)
        trainer = Trainer(PretrainRecipe.model_validate(content), resume=resume)
        trainer.train()
        return trainer

    eager, compiled = train("eager"), train("compiled", compile=True)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("eager", "compiled")
    ]
    for one, other in zip(*logs, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert other["flops_per_pair"] == one["flops_per_pair"]
    expected = weights_of(compiled)
    assert weights_of(eager).keys() == expected.keys()
    assert load_encoder(tmp_path / "compiled").fingerprint == compiled.encoder.fingerprint
    shutil.rmtree(tmp_path / "compiled/checkpoints/step-00000006")
    torch.compiler.reset()  # as in a new process
    assert same(expected, weights_of(train("compiled", compile=True, resume=True)))
    # Going on without is allowed: what the kernels round is all that differs.
    shutil.rmtree(tmp_path / "compiled/checkpoints/step-00000006")
    assert train("compiled", resume=True).step == 6

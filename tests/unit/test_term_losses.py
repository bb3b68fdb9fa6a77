"""The losses of a recipe's terms, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.term_losses import (
    adversarial_loss,
    caption_entropies,
    caption_loss,
    mean_of_batch,
    nt_xent,
    reverse_gradient,
)


def rows(n: int, seed: int, d: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()


def numeric(function, tensor: torch.Tensor) -> torch.Tensor:
    """Central differences."""
    found = torch.zeros(tensor.numel(), dtype=torch.float64)
    for place in range(tensor.numel()):
        step = torch.zeros_like(found)
        step[place] = 1e-6
        ahead, behind = (float(function(tensor.detach() + s * step.view_as(tensor))) for s in (1, -1))
        found[place] = (ahead - behind) / 2e-6
    return found.view_as(tensor)


def test_views_find_each_other_as_in_the_loop():
    first, second = rows(4, 0), rows(4, 1)

    def loop(a, b):
        views = [*a.tolist(), *b.tolist()]
        total = 0.0
        for i, view in enumerate(views):
            twin = (i + 4) % 8
            cosines = [sum(x * y for x, y in zip(view, other, strict=True)) for other in views]
            bottom = sum(math.exp(cosine / 0.2) for j, cosine in enumerate(cosines) if j != i)
            total -= cosines[twin] / 0.2 - math.log(bottom)
        return total / 8

    value = nt_xent(first, second, 0.2)
    value.backward()
    assert float(value.detach()) == pytest.approx(loop(first.detach(), second.detach()), rel=1e-12)
    by_first = numeric(lambda a: loop(a, second.detach()), first)
    torch.testing.assert_close(first.grad, by_first, rtol=1e-6, atol=1e-8)
    by_second = numeric(lambda b: loop(first.detach(), b), second)
    torch.testing.assert_close(second.grad, by_second, rtol=1e-6, atol=1e-8)


def test_views_that_are_all_alike_are_at_chance():
    same = rows(1, 0).detach().expand(6, 5)
    assert float(nt_xent(same, same, 0.1)) == pytest.approx(math.log(11))
    with pytest.raises(ValueError, match="temperature above 0"):
        nt_xent(same, same, 0.0)


@pytest.mark.parametrize("captions", [1, 3])
def test_a_critics_cross_entropy_is_the_loop(captions):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    shape = (5, captions) if captions > 1 else (5,)
    texts = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def loop(images, texts):
        one = [-math.log(1 / (1 + math.exp(-z))) for z in images.tolist()]
        other = [-math.log(1 - 1 / (1 + math.exp(-z))) for z in texts.flatten().tolist()]
        return sum(one) / len(one) / 2 + sum(other) / len(other) / 2

    value = adversarial_loss(images, texts)
    value.backward()
    assert float(value.detach()) == pytest.approx(loop(images.detach(), texts.detach()), rel=1e-12)
    torch.testing.assert_close(
        images.grad, numeric(lambda x: loop(x, texts.detach()), images), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(
        texts.grad, numeric(lambda x: loop(images.detach(), x), texts), rtol=1e-6, atol=1e-9
    )
    assert float(adversarial_loss(torch.zeros(3), torch.zeros(3))) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match=r"pictures \(b,\) and of texts"):
        adversarial_loss(torch.zeros(3), torch.zeros(4))


def test_a_reversed_gradient_is_minus_the_gradient():
    value = torch.tensor([1.0, -2.0], requires_grad=True)
    out = reverse_gradient(value, 0.3)
    assert torch.equal(out, value)
    (out * torch.tensor([1.0, 5.0])).sum().backward()
    torch.testing.assert_close(value.grad, torch.tensor([-0.3, -1.5]))


def test_a_captions_tokens_count_alike_and_padding_does_not():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[1, 4, 2, 0, 0], [1, 3, 5, 4, 2], [1, 2, 0, 0, 0]])
    logits = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    total, count = 0.0, 0
    for line, table in zip(tokens.tolist(), logits.detach().tolist(), strict=True):
        for token, scores in zip(line[1:], table, strict=True):
            if token:
                total -= scores[token] - math.log(sum(math.exp(score) for score in scores))
                count += 1
    value = caption_loss(caption_entropies(logits, tokens, 0), tokens, 0)
    assert count == 7
    assert float(value.detach()) == pytest.approx(total / count, rel=1e-12)
    value.backward()
    again = logits.detach().clone().requires_grad_()
    expected = F.cross_entropy(again.transpose(1, 2), tokens[:, 1:], ignore_index=0)
    expected.backward()
    torch.testing.assert_close(logits.grad, again.grad)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(mean_of_batch(torch.tensor([2.0, 4.0]))) == 3.0
    assert float(mean_of_batch(torch.tensor([2.0, 4.0]), torch.tensor([1, 2]))) == 2.0
    assert float(caption_loss(torch.zeros(1), torch.zeros(1, 5, dtype=torch.int64), 0)) == 0.0

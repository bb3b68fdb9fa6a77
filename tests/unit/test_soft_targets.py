"""Several positives, teachers and weighted negatives, against float64 loops over the pairs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.losses import info_nce
from pretrain.soft_targets import (
    Teacher,
    distillation_loss,
    hard_negative_info_nce,
    multi_positive_info_nce,
    soft_targets,
)

SCALE = 14.3


def rows(n: int, seed: int, d: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()


def logits(a: torch.Tensor, b: torch.Tensor, scale: float = SCALE) -> list[list[float]]:
    return [[scale * sum(x * y for x, y in zip(p, q, strict=True)) for q in b.tolist()] for p in a.tolist()]


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    found = [math.exp(value - top) for value in values]
    return [value / sum(found) for value in found]


def numeric(function, tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of a function of plain numbers, by central differences."""
    found = torch.zeros_like(tensor)
    for place in range(tensor.numel()):
        step = torch.zeros(tensor.numel(), dtype=torch.float64)
        step[place] = 1e-6
        step = step.view_as(tensor)
        found.view(-1)[place] = (function(tensor.detach() + step) - function(tensor.detach() - step)) / 2e-6
    return found


def check(loss, loop, a: torch.Tensor, b: torch.Tensor) -> None:
    """Value and gradients of `loss(a, b, scale)` are those of `loop(a, b, scale)`."""
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    value = loss(a, b, scale)
    value.backward()
    assert float(value.detach()) == pytest.approx(loop(a.detach(), b.detach(), SCALE), rel=1e-12)
    torch.testing.assert_close(a.grad, numeric(lambda x: loop(x, b.detach(), SCALE), a), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(b.grad, numeric(lambda x: loop(a.detach(), x, SCALE), b), rtol=1e-6, atol=1e-8)
    assert scale.grad is not None
    by_scale = numeric(lambda s: loop(a.detach(), b.detach(), float(s)), scale)
    assert float(scale.grad) == pytest.approx(float(by_scale), rel=1e-6)


def test_several_captions_of_an_image_are_the_loop():
    image_ids, text_ids = torch.tensor([7, 3, 9]), torch.tensor([3, 7, 7, 9, 3, 7])

    def loop(a, b, scale):
        total = 0.0
        for x, y, own, other in ((a, b, image_ids, text_ids), (b, a, text_ids, image_ids)):
            for i, line in enumerate(logits(x, y, scale)):
                positives = [j for j in range(len(y)) if own[i] == other[j]]
                shares = softmax(line)
                total -= sum(math.log(shares[j]) for j in positives) / len(positives) / len(x) / 2
        return total

    check(lambda a, b, s: multi_positive_info_nce(a, b, s, image_ids, text_ids), loop, rows(3, 0), rows(6, 1))


def test_rows_that_share_any_id_are_positives_and_labels_can_be_smoothed():
    """Two captions an image, by their own ids; image 1 and image 2 have a caption in common."""
    image_ids, text_ids = torch.tensor([[1, 2], [3, 4], [4, 5]]), torch.tensor([1, 2, 3, 4, 4, 5])
    mine = [{0, 1}, {2, 3, 4}, {3, 4, 5}]  # texts of each image
    smooth = 0.2

    def loop(a, b, scale):
        total = 0.0
        theirs = [{i for i in range(3) if j in mine[i]} for j in range(6)]
        for x, y, positives in ((a, b, mine), (b, a, theirs)):
            for i, line in enumerate(logits(x, y, scale)):
                shares = softmax(line)
                said = sum(math.log(shares[j]) for j in positives[i]) / len(positives[i])
                even = sum(math.log(share) for share in shares) / len(shares)
                total -= ((1 - smooth) * said + smooth * even) / len(x) / 2
        return total

    def loss(a, b, s):
        return multi_positive_info_nce(a, b, s, image_ids, text_ids, label_smoothing=smooth)

    check(loss, loop, rows(3, 0), rows(6, 1))


def test_without_a_repeated_id_it_is_info_nce():
    a, b, scale = rows(6, 0), rows(6, 1), torch.tensor(SCALE, dtype=torch.float64)
    came = multi_positive_info_nce(a, b, scale, torch.randperm(6))
    torch.testing.assert_close(came, info_nce(a, b, scale), rtol=1e-12, atol=0)


def test_a_model_that_cannot_tell_equal_captions_apart_is_not_blamed_for_it():
    """Two pairs with one caption: the best that can be reached is ln 2, and 0 is not asked for."""
    a = F.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1]], dtype=torch.float64), dim=-1).requires_grad_()
    scale = torch.tensor(100.0, dtype=torch.float64)
    multi_positive_info_nce(a, a.detach(), scale, torch.tensor([0, 0, 1])).backward()
    assert a.grad is not None
    assert float(a.grad.norm()) < 1e-12
    a.grad = None
    b = (a.detach() + torch.tensor([[0, 0.01], [0, -0.01], [0, 0]])).requires_grad_()
    info_nce(b, a.detach(), scale).backward()
    assert b.grad is not None
    assert float(b.grad.norm()) > 0  # plain InfoNCE goes on pulling at them


def test_soft_targets_sum_to_one_and_need_a_positive():
    found = soft_targets(torch.tensor([1, 2, 1]), torch.tensor([1, 1, 2, 5]))
    assert found.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.5, 0.5, 0, 0]]
    with pytest.raises(ValueError, match="1 of 2 rows have no positive: every image needs a text"):
        soft_targets(torch.tensor([1, 4]), torch.tensor([1, 2]))
    with pytest.raises(
        ValueError, match=r"expected text features \(n, d\) with ids \(n,\) or \(n, r\), got \(4, 5\)"
    ):
        multi_positive_info_nce(rows(4, 0), rows(4, 1), torch.tensor(1.0), torch.arange(4), torch.arange(3))


@pytest.mark.parametrize("shares", [(1.0, 1.0), (3.0, 1.0)])
def test_distillation_is_the_loop(shares):
    """Two teachers of other widths: the weighted mean of their probabilities, not of their logits."""
    first = shares[0] / sum(shares)
    teachers = [
        (rows(5, 2, 3).detach(), rows(5, 3, 3).detach(), 4.0),
        (rows(5, 4).detach(), rows(5, 5).detach(), 30.0),
    ]

    def loop(a, b, scale):
        total = 0.0
        for turn in (0, 1):
            student = logits(*((a, b) if turn == 0 else (b, a)), scale)
            said = [logits(*((x, y) if turn == 0 else (y, x)), sharp) for x, y, sharp in teachers]
            for i, line in enumerate(student):
                guess = softmax(line)
                one, other = (softmax(table[i]) for table in said)
                target = [first * p + (1 - first) * q for p, q in zip(one, other, strict=True)]
                total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(target, guess, strict=True)) / 10
        return total

    made = [
        Teacher(x.requires_grad_(), y, torch.tensor(sharp, dtype=torch.float64), share)
        for (x, y, sharp), share in zip(teachers, shares, strict=True)
    ]
    check(lambda a, b, s: distillation_loss(a, b, s, made), loop, rows(5, 0), rows(5, 1))
    assert all(teacher.image_features.grad is None for teacher in made)


def test_a_student_that_agrees_is_at_zero():
    a, b, scale = rows(5, 0), rows(5, 1), torch.tensor(SCALE, dtype=torch.float64)
    value = distillation_loss(a, b, scale, [Teacher(a.detach(), b.detach(), scale)])
    assert abs(float(value.detach())) < 1e-14


def test_teachers_that_do_not_fit_are_refused():
    a, b = rows(5, 0), rows(5, 1)
    with pytest.raises(ValueError, match="needs a teacher, got none"):
        distillation_loss(a, b, torch.tensor(1.0), [])
    with pytest.raises(ValueError, match="a teacher's features for 5 pairs, got 4"):
        distillation_loss(a, b, torch.tensor(1.0), [Teacher(rows(4, 0), rows(4, 1), torch.tensor(1.0))])


def test_hard_negatives_are_the_loop():
    beta, n = 0.4, 6
    # The weights are constants in the gradient: the loop has those of the unchanged features.
    a, b = rows(n, 0), rows(n, 1)
    fixed = [logits(a.detach(), b.detach()), logits(b.detach(), a.detach())]

    def loop(x, y, scale):
        total = 0.0
        for z, hard in zip((logits(x, y, scale), logits(y, x, scale)), fixed, strict=True):
            for i in range(n):
                others = [j for j in range(n) if j != i]
                bottom = sum(math.exp(beta * hard[i][j]) for j in others)
                weight = {j: (n - 1) * math.exp(beta * hard[i][j]) / bottom for j in others}
                assert sum(weight.values()) == pytest.approx(n - 1)
                every = math.exp(z[i][i]) + sum(weight[j] * math.exp(z[i][j]) for j in others)
                total -= (z[i][i] - math.log(every)) / (2 * n)
        return total

    check(lambda p, q, s: hard_negative_info_nce(p, q, s, beta=beta), loop, a, b)


def test_without_sharpness_it_is_info_nce_and_a_pair_alone_is_nothing():
    a, b, scale = rows(6, 0), rows(6, 1), torch.tensor(100.0, dtype=torch.float64)
    torch.testing.assert_close(
        hard_negative_info_nce(a, b, scale, beta=0.0), info_nce(a, b, scale), rtol=1e-12, atol=0
    )
    with pytest.raises(ValueError, match=r"expected beta >= 0, got -1"):
        hard_negative_info_nce(a, b, scale, beta=-1)

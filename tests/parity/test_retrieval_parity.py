"""Equal numbers to clip-benchmark's, on random and on real features of pictures and their captions."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from PIL import Image

from retrieval.metrics import retrieval_metrics

pytestmark = pytest.mark.parity


def peer(image, text, owner, ks):
    """The steps of clip_benchmark's `evaluate` after the towers."""
    image = torch.nn.functional.normalize(torch.as_tensor(image), dim=-1)
    text = torch.nn.functional.normalize(torch.as_tensor(text), dim=-1)
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), torch.as_tensor(owner)] = True
    return {
        direction: {
            f"recall@{k}": (batchify(recall_at_k, s, good, 64, "cpu", k=k) > 0).float().mean().item()
            for k in ks
        }
        for direction, s, good in (
            ("text_to_image", scores, positive),
            ("image_to_text", scores.T, positive.T),
        )
    }


def agree(image, text, owner, ks=(1, 5, 10)):
    ours, theirs = retrieval_metrics(image, text, owner, ks, block=128), peer(image, text, owner, ks)
    for direction, numbers in theirs.items():
        for name, value in numbers.items():
            # Theirs is a float32 mean; the hits themselves are equal.
            assert ours[direction][name] == pytest.approx(value, abs=1e-6), (direction, name)
    return ours


@pytest.mark.parametrize("seed", range(3))
def test_random_embeddings(seed):
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(200), rng.integers(0, 200, 500)])
    image = rng.standard_normal((200, 48)).astype(np.float32)
    text = (0.4 * image[owner] + rng.standard_normal((700, 48))).astype(np.float32)
    assert 0.05 < agree(image, text, owner)["text_to_image"]["recall@1"] < 0.95


def test_real_pictures_and_captions(shared):
    # Real data with its near-ties and clusters: colour thumbnails and hashed words, mapped into one space by
    # ridge regression on other pairs.
    captions: dict[str, list[str]] = {}
    for line in (shared / "flickr8k" / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        name, caption = line.split("\t", 1)
        captions.setdefault(name.split("#")[0], []).append(caption.lower())

    def pixels(names):
        folder = shared / "flickr8k" / "Flickr8k_Dataset"
        rows = []
        for name in names:
            with Image.open(folder / name) as picture:
                rows.append(np.asarray(picture.convert("RGB").resize((8, 8))).ravel() / 255)
        return np.array(rows)

    def words(texts):
        rows = np.zeros((len(texts), 256))
        for row, caption in zip(rows, texts, strict=True):
            for word in caption.split():
                row[hashlib.md5(word.encode()).digest()[0]] += 1
        return rows

    def names_of(split):
        names = (shared / "flickr8k" / f"Flickr_8k.{split}.txt").read_text().split()
        return [name for name in names if name in captions]

    train, dev = names_of("trainImages")[:600], names_of("devImages")[:200]
    x, y = pixels(train), words([" ".join(captions[name]) for name in train])
    centre = x.mean(0)
    weights = np.linalg.solve(
        (x - centre).T @ (x - centre) + 5 * np.eye(x.shape[1]), (x - centre).T @ (y - y.mean(0))
    )
    owner = np.arange(len(dev)).repeat([len(captions[name]) for name in dev])
    image = ((pixels(dev) - centre) @ weights).astype(np.float32)
    text = (words([c for name in dev for c in captions[name]]) - y.mean(0) / 5).astype(np.float32)
    ours = agree(image, text, owner)
    assert ours["text_to_image"]["recall@10"] > 0.06  # chance is 0.05: the features mean something

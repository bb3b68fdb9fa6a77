"""Words of texts, and how much each matters."""

from __future__ import annotations

import pytest
import torch

from explain.words import integrated_tokens, merge_tokens, offset_words, token_words, word_relevance
from pretrain.encoder import build_encoder
from pretrain.recipe_model import TowersModel

TEXT = "Two heart-shaped   unicornballoons, naïve!"


def test_tokens_are_merged_to_the_words_as_written(explained):
    encoder = explained["vit"]
    words, of = token_words(encoder, TEXT)
    assert words == ["Two", "heart-shaped", "unicornballoons,", "naïve!"]
    row = encoder.tokenize([TEXT])[0].tolist()
    pieces = [encoder.tokenizer.encode(word) for word in words]
    assert of == [
        -1,
        *(n for n, ids in enumerate(pieces) for _ in ids),
        *[-1] * (len(row) - 1 - sum(map(len, pieces))),
    ]
    assert row[1 : 1 + sum(map(len, pieces))] == [piece for ids in pieces for piece in ids]
    assert merge_tokens(torch.tensor([9.0, 1, 2, 3, 9]), [-1, 0, 1, 1, -1], ["a", "bc"]) == [
        ("a", 1.0),
        ("bc", 5.0),
    ]


def test_words_behind_the_context_have_no_token(explained):
    words, of = token_words(explained["vit"], " ".join(["heart"] * 40))
    assert len(words) == 40
    assert max(of) == 13  # of 16 places, start and end are marks
    assert of[-1] == -1


def test_words_of_a_transformers_tokenizer(tiny_bert):
    text = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    content = {"kind": "towers", "embed_dim": 16, "text_tower": text, "image_tower": {"kind": "vit"}}
    torch.manual_seed(0)
    encoder = build_encoder(TowersModel.model_validate(content), device="cpu")
    words, of = token_words(encoder, "a red thing")
    assert words == ["a", "red", "thing"]
    assert of[:5] == [-1, 0, 1, 2, -1]
    row = torch.nn.functional.normalize(torch.randn(16), dim=0)
    found = word_relevance(encoder, row, "a red thing", "chefer")
    assert [word for word, _ in found] == words
    assert all(value >= 0 for _, value in found)
    with pytest.raises(ValueError, match="integrated gradients of words need open_clip's own text tower"):
        word_relevance(encoder, row, "a red thing", "integrated_gradients")
    assert offset_words("a bc", [(0, 1), (2, 4), (4, 4)]) == (["a", "bc"], [0, 1, -1])


@pytest.mark.parametrize("method", ["chefer", "rollout", "occlusion", "integrated_gradients", "lime", "shap"])
def test_each_method_explains_words(explained, pictures, method):
    encoder = explained["vit"]
    row = encoder.encode_images(pictures(encoder, 1))[0]
    found = word_relevance(encoder, row, "two red hearts", method)
    assert [word for word, _ in found] == ["two", "red", "hearts"]
    values = torch.tensor([value for _, value in found])
    assert bool(torch.isfinite(values).all())
    assert float(values.abs().max()) > 0
    if method == "occlusion":
        whole, without = (
            float(encoder.encode_texts([text])[0] @ row) for text in ("two red hearts", "two hearts")
        )
        assert values[1] == pytest.approx(whole - without, abs=1e-5)
    if method == "shap":
        whole, empty = (float(encoder.encode_texts([text])[0] @ row) for text in ("two red hearts", ""))
        assert float(values.sum()) == pytest.approx(whole - empty, abs=1e-4)
    with pytest.raises(ValueError, match="an empty text has no words"):
        word_relevance(encoder, row, " ", method)


def test_rollout_of_words_ignores_the_picture_and_chefer_does_not(explained, pictures):
    encoder = explained["vit"]
    one, other = encoder.encode_images(pictures(encoder, 2))
    assert word_relevance(encoder, one, "a red heart", "rollout") == word_relevance(
        encoder, other, "a red heart", "rollout"
    )
    assert word_relevance(encoder, one, "a red heart", "chefer") != word_relevance(
        encoder, other, "a red heart", "chefer"
    )


def test_integrated_gradients_of_words_add_up(explained, pictures):
    encoder = explained["vit"]
    row = encoder.encode_images(pictures(encoder, 1))[0]
    tokens = encoder.tokenize(["two red hearts"])
    total = float(integrated_tokens(encoder, row, tokens, steps=128).sum())
    blank = encoder.model.token_embedding(torch.zeros(1, 3, dtype=torch.int64))
    handle = encoder.model.token_embedding.register_forward_hook(
        lambda m, i, output: torch.cat([output[:, :1], blank, output[:, 4:]], dim=1)
    )
    nothing = float(encoder.encode_texts(tokens)[0] @ row)
    handle.remove()
    assert total == pytest.approx(float(encoder.encode_texts(tokens)[0] @ row) - nothing, abs=5e-3)

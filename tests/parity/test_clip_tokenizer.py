"""Our batch tokeniser against open_clip's SimpleTokenizer: the same ids for any text."""

import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from data import cleaning, tokens
from data.cleaning import CLEAN, clean_text
from data.stream import pair_stream
from data.tokens import ClipTokenizer, batch_tokenizer
from data.transforms import EvalTransform

pytestmark = pytest.mark.parity

HARD = json.loads((Path(__file__).parents[1] / "fixtures" / "hard_texts.json").read_text())
THEIRS = SimpleTokenizer()
OURS = ClipTokenizer(SimpleTokenizer())

# Whatever one of the two could treat apart: entities, quotes, joiners, mojibake, special tokens, odd spaces.
PIECES = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(max_codepoint=0xFF), max_size=12),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20),
    st.sampled_from(HARD).map(lambda text: text[:60]),
    st.sampled_from(
        ["&", "&amp;", "&lt", "&#x41;", "'S", "’ll", "<start_of_text>", "<END_OF_TEXT>", "1", "_", "--"]
    ),
    st.sampled_from(
        ["İ", "ſ", "\u212a", "Ã©", "â€™", "ﬃ", "Ａ", "e\u0301", "\u200d", "\ud83d", "\udc00", "\x1b[1m"]
    ),
    st.sampled_from(["\x1c", "\x85", "\xa0", "\u2028", "\r\n", "\t", "\x0b", "\0"]),
)


@given(st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_text_has_open_clips_ids(texts):
    assert torch.equal(OURS(texts), THEIRS(texts))


@given(st.lists(PIECES, max_size=8).map("".join))
@settings(max_examples=300, deadline=None)
def test_cleaning_is_open_clips(text):
    assert clean_text(text) == THEIRS.clean_fn(text)


def test_every_character_is_cleaned_alike():
    for code in (*range(0x3100), *range(0xD7F0, 0xE010), *range(0xF900, 0x10000), 0x1F600, 0xE0001):
        for text in (f"a{chr(code)}b", f"{chr(code)}{chr(code)}"):
            assert clean_text(text) == THEIRS.clean_fn(text), hex(code)


def test_what_is_known_of_characters_stays_small(monkeypatch):
    monkeypatch.setattr(cleaning, "KEPT_CHARACTERS", 20)
    monkeypatch.setattr(cleaning, "LONGEST", 50)
    touched = cleaning._Touched()
    monkeypatch.setattr(cleaning, "_TOUCHED", touched)
    for text in HARD:
        assert clean_text(text) == THEIRS.clean_fn(text)
        assert len(touched) <= 20


@given(st.from_regex(CLEAN, fullmatch=True))
@settings(max_examples=150, deadline=None)
def test_cleaning_changes_only_case_and_space_of_plain_text(text):
    assert THEIRS.clean_fn(text) == " ".join(text.lower().split())


def test_each_plain_character_between_letters_is_left_alone():
    plain = [chr(code) for code in range(0x110000) if CLEAN.fullmatch(chr(code))]
    assert len(plain) == 96  # printable ASCII without "&", tab and line feed
    for char in plain:
        for text in (f"A{char}b", f"{char}{char}", f"1{char}<"):
            assert THEIRS.clean_fn(text) == " ".join(text.lower().split())


@pytest.mark.parametrize("context_length", [None, 77, 16, 2, 1])
def test_the_hard_texts(context_length):
    expected = THEIRS(HARD, context_length)
    result = OURS(HARD, context_length)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)
    assert torch.equal(OURS(HARD, context_length), expected)  # and once more, from what it kept
    assert (result != 0).any(1).all()


def test_one_text_no_text_and_every_caption_of_flickr8k(shared):
    assert torch.equal(OURS("A dog."), THEIRS("A dog."))
    assert OURS([]).shape == THEIRS([]).shape == (0, 77)
    lines = (shared / "flickr8k/Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()[:3000]
    captions = [line.split("\t", 1)[-1] for line in lines]
    assert torch.equal(OURS(captions), THEIRS(captions))


def test_what_is_kept_stays_small(monkeypatch):
    monkeypatch.setattr(tokens, "KEPT_WORDS", 50)
    fast = ClipTokenizer(SimpleTokenizer())
    texts = [f"word{number} and {'x' * 80}{number}" for number in range(300)]
    assert torch.equal(fast(texts), THEIRS(texts))
    assert 0 < len(fast.words) <= 50
    assert max(map(len, fast.words)) <= tokens.LONGEST_KEPT
    assert len(fast.words.encoder.cache) < 10
    assert len(fast.tokenizer.cache) == 2  # open_clip's own was not filled


def test_it_can_be_pickled_for_workers_that_are_not_forked():
    copy = pickle.loads(pickle.dumps(OURS))
    assert torch.equal(copy(HARD), OURS(HARD))


@pytest.mark.parametrize(
    "tokenizer",
    [
        SimpleTokenizer(clean="canonicalize"),
        SimpleTokenizer(clean="whitespace"),
        SimpleTokenizer(reduction_mask="simple"),
        SimpleTokenizer(additional_special_tokens=["<mask me>"]),
        type("Derived", (SimpleTokenizer,), {})(),
        len,
    ],
    ids=["canonicalize", "whitespace", "reduction", "special tokens", "subclass", "function"],
)
def test_any_other_tokenizer_is_left_alone(tokenizer):
    assert batch_tokenizer(tokenizer) is tokenizer


def test_a_stream_takes_it_by_default(tiny_shards):
    stream = pair_stream(
        tiny_shards, transform=EvalTransform(8), tokenize=open_clip.get_tokenizer("ViT-B-32"), batch_size=10
    )
    assert isinstance(stream.collate.tokenize, ClipTokenizer)
    batch = next(stream.epoch())
    assert torch.equal(batch["tokens"], THEIRS(batch["texts"]))


def test_no_context_length():
    with pytest.raises(ValueError, match="context_length is a number of tokens, at least 1, got None"):
        ClipTokenizer(SimpleTokenizer(context_length=None))(["a"])

"""Rows of several pictures and texts: how they are made, that the loss is that of each text after its examples, that
a frozen language model with gates learns from them, and that examples stand in front as in training.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finetune.examples import read_examples
from finetune.recipe_model import CrossAttention, Mlp
from finetune.recipe_task import CaptionTask, Decoding, VqaTask
from finetune.rows import Rows, Turn
from finetune.samples import TrainCollate
from finetune.text import IGNORED, Pair, make_pair, token_ids

CONNECTORS = {"mlp": Mlp(merge=2), "gated": CrossAttention(heads=2)}


def turn(picture: int, prompt: int, answer: int) -> Turn:
    return Turn(picture, Pair([5] * prompt, [7] * answer))


def test_each_text_once_with_other_pictures_in_front():
    turns = [turn(0, 1, 1), turn(0, 2, 1), turn(1, 1, 1), turn(2, 1, 1), turn(2, 2, 1)]
    rows = Rows(shots=2, prefix=1, context=100)(turns)
    assert [[each.picture for each in row] for row in rows] == [[0, 1, 2], [0, 2]]
    assert sorted(each for row in rows for each in row) == sorted(turns)
    assert [len(row) for row in Rows(shots=1, prefix=1, context=100)(turns)] == [2, 2, 1]
    assert [len(row) for row in Rows(shots=2, prefix=1, context=7)(turns)] == [2, 2, 1]
    assert Rows(shots=2, prefix=1, context=100)([]) == []


def test_rows_are_packed_with_room_for_the_pictures():
    batch = Rows(shots=1, prefix=2, context=100).pack([turn(0, 1, 2), turn(1, 0, 1), turn(2, 1, 1)], pad=9)
    assert batch["input_ids"].tolist() == [[9, 9, 5, 7, 7, 9, 9, 7], [9, 9, 5, 7, 9, 9, 9, 9]]
    assert batch["slots"].tolist() == [[0, 1, -1, -1, -1, 2, 3, -1], [4, 5, -1, -1, -1, -1, -1, -1]]
    assert batch["labels"].tolist() == [
        [IGNORED] * 3 + [7, 7, IGNORED, IGNORED, 7],
        [IGNORED] * 3 + [7] + [IGNORED] * 4,
    ]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 4 + [0] * 4]
    assert batch["owner"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1] * 8]
    assert batch["pictures"].tolist() == [[0, 1], [2, 2]]
    empty = TrainCollate(0, (8, 8), rows=Rows(1, 2, 100))([])
    assert (tuple(empty["input_ids"].shape), tuple(empty["pictures"].shape)) == ((0, 0), (0, 1))


@pytest.fixture(scope="module", params=CONNECTORS)
def model(request, make_writer):
    return make_writer(CONNECTORS[request.param], CaptionTask(prompt="red"), unsettled=True)


@pytest.fixture
def files(make_picture) -> list[bytes]:
    return [make_picture(seed) for seed in range(5)]


def batch_of(model, files, texts, shots: int):
    rows = Rows(shots, model.prefix_length, model.context)
    collate = TrainCollate(model.tokenizer.pad_token_id, model.encoder.image_size, rows=rows)
    pairs = [[make_pair(model.tokenizer, "red", text)] for text in texts]
    return collate([(model.encoder.preprocess(file), pair) for file, pair in zip(files, pairs, strict=True)])


TEXTS = ["dog", "two blue dogs", "yes", "a red cat on the left", "no"]


@torch.no_grad()
def test_the_loss_is_that_of_each_word_after_all_in_front_of_it(model, files):
    batch = batch_of(model, files, TEXTS, shots=2)
    assert batch["pictures"].tolist() == [[0, 1, 2], [3, 4, 4]]
    found = model(**batch)
    seen, embed = model.see(files), model.language_model.get_input_embeddings()
    total = 0.0
    for row in ([0, 1, 2], [3, 4]):
        sequence, owner, labels = [], [], []
        for place, picture in enumerate(row):
            prompt, answer = make_pair(model.tokenizer, "red", TEXTS[picture])
            prefix = model.connector.prefix(seen[[picture]])[0]
            sequence += [prefix, embed(torch.tensor([*prompt, *answer]))]
            owner += [place + 1] * (len(prefix) + len(prompt) + len(answer))
            labels += [IGNORED] * (len(prefix) + len(prompt)) + answer
        model.connector.look(seen[row].flatten(0, 1)[None], torch.tensor([owner]))
        logits = model.language_model(inputs_embeds=torch.cat(sequence)[None]).logits[0]
        total += F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=IGNORED, reduction="sum")
    model.connector.look(None)
    torch.testing.assert_close(found, total, atol=1e-3, rtol=1e-5)
    alone = model(**batch_of(model, files, TEXTS, shots=4))
    assert abs(float(alone - found)) > 1e-2  # what stands in front counts
    model.length_groups = 2
    torch.testing.assert_close(model(**batch), found, atol=1e-3, rtol=1e-5)
    model.length_groups = 1


def test_examples_stand_in_front_as_in_training(model, files):
    """Greedy text after examples is what the model, shown the same rows in training, holds for likeliest."""
    decoding = Decoding(max_new_tokens=6)
    shown = [(files[0], "dog"), (files[1], "two blue dogs")]
    [text] = model.caption(files[2:3], decoding, examples=shown)
    end = model.tokenizer.eos_token
    row = [files[0], f"red dog{end}", files[1], f"red two blue dogs{end}", files[2], "red"]
    prompt, answer = make_pair(model.tokenizer, "red", "dog")
    assert token_ids(model.tokenizer, f"red dog{end}") == [*prompt, *answer]
    assert model.complete([row], decoding) == [text]
    assert model.caption(files[2:4], decoding, examples=shown)[0] == text
    assert model.caption(files[2:3], decoding) != [text]


def test_gates_before_a_frozen_language_model_learn_from_rows(files, make_writer):
    model = make_writer(CONNECTORS["gated"], CaptionTask(), freeze_language_model=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    rows = Rows(4, model.prefix_length, model.context)
    collate = TrainCollate(model.tokenizer.pad_token_id, model.encoder.image_size, rows=rows)
    pixels = [model.encoder.preprocess(file) for file in files]
    pairs = [[make_pair(model.tokenizer, "", text)] for text in TEXTS]
    batch = collate(list(zip(pixels, pairs, strict=True)))
    model.train()
    losses = []
    for _ in range(40):
        loss = model(**batch) / 5
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


def test_examples_are_read_from_a_table(tmp_path, make_picture):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(make_picture(number))
    table = tmp_path / "few.csv"
    table.write_text("image,caption,question,answer\n0.jpg,a cät,how many?,two\n1.jpg,a dog,what?,dog\n")
    pictures = [make_picture(0), make_picture(1)]
    assert read_examples(table, "caption") == [(pictures[0], "a cät"), (pictures[1], "a dog")]
    assert read_examples(table, "vqa") == [(pictures[0], "how many?", "two"), (pictures[1], "what?", "dog")]
    with pytest.raises(ValueError, match="--examples are for models that write, this one is for classify"):
        read_examples(table, "classify")
    table.write_text("image,caption\n0.jpg,a cat\n7.jpg,a dog\n1.jpg,\n")
    with pytest.raises(ValueError, match=r"few.csv:4: nothing in .*; few.csv:3: no picture"):
        read_examples(table, "caption")
    with pytest.raises(FileNotFoundError, match="no table"):
        read_examples(tmp_path / "none.csv", "caption")


def test_answers_take_examples_with_questions(files, make_writer):
    model = make_writer(CONNECTORS["mlp"], VqaTask(), unsettled=True)
    [text] = model.answer(files[:1], ["dog?"], examples=[(files[1], "how many?", "two")])
    assert text != model.answer(files[:1], ["dog?"])[0]

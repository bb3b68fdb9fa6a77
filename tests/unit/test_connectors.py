"""Resampler and cross-attention: gates, caches, padding, several pictures in a row, frozen language models, saving."""

from __future__ import annotations

import pytest
import torch

from finetune.connectors import build_connector
from finetune.cross_attention import decoder_layers
from finetune.model import VisionLanguageModel, load_task_model
from finetune.recipe_model import CrossAttention, Mlp, Resampler
from finetune.recipe_task import CaptionTask, Decoding
from finetune.text import make_pair, pack, token_ids

CONNECTORS = {
    "mlp": Mlp(merge=2),
    "resampler": Resampler(queries=3, width=16, layers=2, heads=2),
    "gated": CrossAttention(heads=2),
    "open": CrossAttention(heads=2, gated=False, every=2),
    "resampled": CrossAttention(heads=2, queries=2),
}


@pytest.fixture(scope="module")
def models(make_writer) -> dict[str, VisionLanguageModel]:
    return {
        name: make_writer(config, kind="llama" if name == "resampled" else "gpt2", unsettled=True)
        for name, config in CONNECTORS.items()
    }


@pytest.fixture
def files(make_picture) -> list[bytes]:
    return [make_picture(seed) for seed in range(8)]


QUESTIONS = ["dog?", "how many cats are there on the left of the red dogs?", "Is there a dog?", "a"] * 2


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("beams", [1, 3])
def test_cache_and_neighbours_change_nothing(models, files, name, beams):
    model, decoding = models[name], Decoding(num_beams=beams, max_new_tokens=10)
    together = model.answer(files, QUESTIONS, decoding)
    prefix, prompts = model.see(files), [model.prompt(question) for question in QUESTIONS]
    if beams == 1:
        assert model.write(prefix, range(8), prompts, decoding, use_cache=False) == together
    alone = [
        model.answer([file], [question], decoding)[0] for file, question in zip(files, QUESTIONS, strict=True)
    ]
    assert alone == together
    assert len(set(together)) > 2
    again = model.write(prefix, [0] * 8, prompts, decoding)
    assert again != together  # the picture counts


@pytest.mark.parametrize("name", CONNECTORS)
def test_the_loss_is_that_of_one_word_at_a_time(models, files, name):
    model = models[name]
    pairs = [
        make_pair(model.tokenizer, "is there a dog?", "yes"),
        make_pair(model.tokenizer, "cats", "two dogs"),
    ]
    images = torch.stack([model.encoder.preprocess(file) for file in files[:2]])
    batch = pack(pairs, model.tokenizer.pad_token_id)
    embed = model.language_model.get_input_embeddings()
    with torch.no_grad():
        loss = model(images=images, image_of_text=torch.tensor([1, 0]), **batch)
        seen, expected = model.see(images), 0.0
        for picture, (prompt, answer) in zip([1, 0], pairs, strict=True):
            model.connector.look(seen[picture : picture + 1])
            for place, token in enumerate(answer):
                row = torch.cat(
                    [model.connector.prefix(seen)[picture], embed(torch.tensor(prompt + answer[:place]))]
                )
                logits = model.language_model(inputs_embeds=row[None]).logits[0, -1]
                expected -= float(torch.log_softmax(logits.double(), -1)[token])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_closed_gates_leave_the_language_model_as_it_was(files, make_writer):
    plain = make_writer(Mlp()).language_model
    ids = torch.tensor([[5, 9, 30, 7]])
    expected = plain(ids).logits
    model = make_writer(CrossAttention(heads=2))
    for parameter in model.connector.parameters():
        if parameter.shape == (2,):
            torch.nn.init.zeros_(parameter)
    model.connector.look(model.see(files[:1]))
    assert torch.equal(model.language_model(ids).logits, expected)
    model.connector.look(None)
    torch.nn.init.constant_(model.connector.blocks[0].gates, 1.0)
    assert torch.equal(model.language_model(ids).logits, expected)  # no picture, no change
    model.connector.look(model.see(files[:1]))
    assert not torch.allclose(model.language_model(ids).logits, expected)


@pytest.mark.parametrize("name", ["mlp", "gated", "resampled"])
def test_pictures_and_texts_in_turns(models, files, name):
    model = models[name]
    a, b, c = files[:3]
    rows = [[a, "red cat", b, "two", c, "dog"], [c, "dog"], ["no picture ", a], [b, "two", c, "dog"]]
    together = model.complete(rows)
    assert together == [model.complete([row])[0] for row in rows]
    assert together[1] == model.write(model.see([c]), [0], ["dog"])[0]
    changed = model.complete([[b, "red cat", a, "two", c, "dog"]])[0]
    assert (changed, together[1]) != (together[0], together[0])
    assert model.complete([]) == []
    with pytest.raises(ValueError, match="row 0 is empty"):
        model.complete([[]])
    with pytest.raises(ValueError, match="the prompt does not fit"):
        model.complete([[a, "many " * 80]])


def test_a_text_sees_the_picture_in_front_of_it_and_no_other(models, files):
    """As in Flamingo: with the attention of the language model cut off, only the last picture counts."""
    model = models["gated"]
    seen = model.see(files[:3])
    block = model.connector.blocks[0]
    x = torch.randn(1, 4, 32)
    owner = torch.tensor([[0, 1, 1, 2]])
    model.connector.look(seen[[0, 1]].flatten(0, 1)[None], owner)
    found = model.connector.add(0, x)
    for place, picture in ((1, 0), (2, 0), (3, 1)):
        alone = block(x[:, place : place + 1], block.remember(seen[picture][None]), None)
        torch.testing.assert_close(found[:, place : place + 1], alone, atol=1e-6, rtol=1e-5)
    none = x[:, :1] + torch.tanh(block.gates[0]) * block.output.bias
    none = none + torch.tanh(block.gates[1]) * block.second(none)
    torch.testing.assert_close(found[:, :1], none, atol=1e-6, rtol=1e-5)
    model.connector.look(None)


@pytest.mark.parametrize("name", ["resampler", "gated", "resampled"])
def test_they_learn_before_a_frozen_language_model_and_come_back_from_disk(
    files, tmp_path, name, make_writer
):
    captions = ["a red cat", "two blue dogs", "no", "yes"]
    model = make_writer(CONNECTORS[name], CaptionTask(), freeze_language_model=True)
    frozen = {key: value.clone() for key, value in model.language_model.state_dict().items()}
    images = torch.stack([model.encoder.preprocess(file) for file in files[:4]])
    batch = pack([make_pair(model.tokenizer, "", text) for text in captions], model.tokenizer.pad_token_id)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for step in range(60):
        loss = model(images=images, image_of_text=torch.arange(4), **batch) / 4
        loss.backward()
        if step == 0:
            first = float(loss.detach())
            assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < first / 2
    assert all(torch.equal(value, frozen[key]) for key, value in model.language_model.state_dict().items())
    model.eval()
    written = model.caption(files)
    opened = load_task_model(model.save(tmp_path / "model"), device="cpu")
    assert opened.connector_config == CONNECTORS[name]
    assert opened.caption(files) == written


def test_what_does_not_fit_is_refused(make_writer):
    model = make_writer(Mlp()).language_model
    size = {"grid": (4, 4), "token_dim": 8, "width": 32, "language_model": model}
    with pytest.raises(ValueError, match="heads 5 does not divide the language model's width 32"):
        build_connector(CrossAttention(heads=5), **size)
    with pytest.raises(ValueError, match="every 3: the language model has 2 layers"):
        build_connector(CrossAttention(heads=2, every=3), **size)
    with pytest.raises(ValueError, match="not a multiple of heads"):
        Resampler(width=30, heads=4)
    model.config.n_layer = 7
    with pytest.raises(ValueError, match="has no list of 7 layers"):
        decoder_layers(model)


def test_decoding_settings_reach_generate(models, files):
    model = models["mlp"]
    plain = model.answer(files, QUESTIONS)
    rows = [[place, token_ids(model.tokenizer, question)] for place, question in enumerate(QUESTIONS)]
    unique = Decoding(max_new_tokens=30, no_repeat_ngram=1)
    for row in model.generate_ids(model.see(files), rows, unique).tolist():
        written = [number for number in row if number != model.tokenizer.pad_token_id]
        assert len(written) == len(set(written)) > 3
    long = model.generate_ids(model.see(files), rows, Decoding(max_new_tokens=40, min_new_tokens=40))
    assert long.shape == (8, 40)
    torch.manual_seed(0)
    drawn = [model.answer(files, QUESTIONS, Decoding(max_new_tokens=10, sample=True)) for _ in range(2)]
    assert drawn[0] != drawn[1]
    narrow = Decoding(max_new_tokens=10, sample=True, top_p=1e-6)
    assert model.answer(files, QUESTIONS, narrow) == plain  # only the likeliest is left to draw from
    ends = [
        model.answer(files, QUESTIONS, Decoding(max_new_tokens=10, num_beams=4, length_penalty=penalty))
        for penalty in (-8.0, 8.0)
    ]
    assert sum(map(len, ends[0])) <= sum(map(len, ends[1]))
    with pytest.raises(ValueError, match="seed is about drawing"):
        Decoding(seed=1)
    with pytest.raises(ValueError, match="temperature and top_p are about drawing"):
        Decoding(top_p=0.9)
    with pytest.raises(ValueError, match="min_new_tokens 31 is above"):
        Decoding(min_new_tokens=31)

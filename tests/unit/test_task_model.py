"""The vision-language model: labels, padding, caches, freezing, saving, and what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from data.faults import Fault
from data.samples import RawSample
from finetune.connectors import build_connector, merge_neighbours, token_grid
from finetune.drawing import own_draws
from finetune.language_models import pretrained_language_model, small_language_model
from finetune.model import VisionLanguageModel, load_task_model
from finetune.recipe_model import Linear, Mlp, SmallLanguageModel
from finetune.recipe_task import CaptionTask, Decoding, VqaTask
from finetune.samples import read_questions
from finetune.text import END, IGNORED, Pair, make_pair, pack, require_end_and_pad, train_tokenizer
from pretrain.encoder import build_encoder
from pretrain.recipe_model import ResNet, TextTransformer, TowersModel, ViT

WORDS = ["a red cat on the left", "two blue dogs", "Is there a dog?", "how many cats are there?", "yes", "no"]
TEXT = TextTransformer(context_length=16, width=16, heads=2, layers=1)
VIT = ViT(image_size=32, patch_size=8, width=32, layers=2, head_width=16)


def make_encoder(tower: ViT | ResNet = VIT):
    torch.manual_seed(0)
    return build_encoder(TowersModel(embed_dim=16, image_tower=tower, text_tower=TEXT), device="cpu")


def make_model(task: CaptionTask | VqaTask, tower: ViT | ResNet = VIT, **options) -> VisionLanguageModel:
    encoder = make_encoder(tower)
    tokenizer = train_tokenizer(WORDS, 300)
    torch.manual_seed(1)
    config = SmallLanguageModel(width=32, layers=2, heads=2, context=64, dropout=0.0, vocabulary=300)
    language_model = small_language_model(config, tokenizer)
    # Random embeddings this large make random text that depends on every position.
    torch.nn.init.normal_(language_model.get_input_embeddings().weight, std=1.0)
    connector = options.pop("connector", Mlp(merge=2))
    return VisionLanguageModel(
        encoder, connector, language_model, tokenizer, task, Decoding(max_new_tokens=12), **options
    ).eval()


@pytest.fixture(scope="module")
def answerer() -> VisionLanguageModel:
    return make_model(VqaTask())


@pytest.fixture
def files(make_picture) -> list[bytes]:
    return [make_picture(seed) for seed in range(4)]


def test_labels_stand_on_the_answer_and_its_end_only():
    tokenizer = train_tokenizer(WORDS, 300)
    pairs = [make_pair(tokenizer, "Is there a dog?", "yes"), make_pair(tokenizer, "two", "no"), Pair([], [5])]
    batch = pack(pairs, tokenizer.pad_token_id)
    for row, (prompt, answer) in enumerate(pairs):
        labels = batch["labels"][row].tolist()
        assert labels[: len(prompt)] == [IGNORED] * len(prompt)
        assert labels[len(prompt) : len(prompt) + len(answer)] == answer
        assert set(labels[len(prompt) + len(answer) :]) <= {IGNORED}
        assert batch["attention_mask"][row].sum() == len(prompt) + len(answer)
    assert pairs[0].answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(pairs[0].answer, skip_special_tokens=True).strip() == "yes"


def test_any_text_survives_the_tokenizer():
    tokenizer = train_tokenizer(WORDS, 300)
    for text in ("naïve café", "日本", "a zebra, isn't it?"):
        assert (
            tokenizer.decode(make_pair(tokenizer, "", text).answer, skip_special_tokens=True).strip() == text
        )


def test_the_loss_is_that_of_a_plain_loop(answerer, files):
    pairs = [
        make_pair(answerer.tokenizer, "is there a dog?", "yes"),
        make_pair(answerer.tokenizer, "cats", "two dogs"),
    ]
    images = torch.stack([answerer.encoder.preprocess(file) for file in files[:2]])
    batch = pack(pairs, answerer.tokenizer.pad_token_id)
    with torch.no_grad():
        loss = answerer(images=images, image_of_text=torch.tensor([1, 0]), **batch)
        prefix = answerer.see(images)
        expected = 0.0
        for picture, (prompt, answer) in zip([1, 0], pairs, strict=True):
            for place, token in enumerate(answer):  # one word at a time, nothing padded
                ids = torch.tensor(prompt + answer[:place])
                embeddings = torch.cat([prefix[picture], answerer.language_model.get_input_embeddings()(ids)])
                logits = answerer.language_model(inputs_embeds=embeddings[None]).logits[0, -1]
                expected -= float(torch.log_softmax(logits.double(), -1)[token])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_pictures_count(answerer, files):
    """A model that ignores its picture would pass many of the other tests."""
    prefix = answerer.see(files[:2])
    assert not torch.allclose(prefix[0], prefix[1])
    batch = pack([make_pair(answerer.tokenizer, "dog?", "yes")], answerer.tokenizer.pad_token_id)
    images = torch.stack([answerer.encoder.preprocess(file) for file in files[:2]])
    with torch.no_grad():
        losses = [
            float(answerer(images=images, image_of_text=torch.tensor([place]), **batch)) for place in (0, 1)
        ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_padded_batch_writes_what_one_alone_writes(answerer, files, beams):
    questions = ["dog?", "how many cats are there on the left of the red dogs?", "Is there a dog?", "a"]
    decoding = Decoding(num_beams=beams, max_new_tokens=12)
    together = answerer.answer(files, questions, decoding)
    alone = [
        answerer.answer([file], [question], decoding)[0]
        for file, question in zip(files, questions, strict=True)
    ]
    assert together == alone
    assert len(set(together)) > 1


def test_draws_of_a_seed_a_row_follow_the_probabilities(answerer, files):
    scores = torch.tensor([[0.0, 1.0, -1.0, 0.5, -9.0]]).repeat(4000, 1)
    plain, drawing = own_draws(Decoding(sample=True, temperature=0.5, top_p=0.8), range(4000))
    drawn = drawing(torch.zeros(4000, 0, dtype=torch.int64), scores).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=5) / 4000
    kept = torch.softmax(scores[0, [1, 3]] / 0.5, dim=0)  # 0.90 of all between the two of them
    assert shares.tolist() == pytest.approx([0, float(kept[0]), 0, float(kept[1]), 0], abs=0.03)
    assert plain == Decoding()
    with pytest.raises(ValueError, match="got 2 seeds for 1 rows"):
        answerer.write(answerer.see(files[:1]), [0], ["is it?"], Decoding(sample=True), seeds=[1, 2])


def test_the_cache_changes_nothing(answerer, files, monkeypatch):
    prefix, prompts = answerer.see(files), ["dog?", "how many cats?", "a", "is there a red dog?"]
    cached = answerer.write(prefix, range(4), prompts)
    lengths, forward = [], answerer.language_model.forward

    def counted(**inputs):
        lengths.append(inputs["inputs_embeds"].shape[1])
        return forward(**inputs)

    with monkeypatch.context() as patch:
        patch.setattr(answerer.language_model, "forward", counted)
        assert answerer.write(prefix, range(4), prompts, use_cache=False) == cached
    assert len(lengths) > 1
    assert lengths == list(range(lengths[0], lengths[0] + len(lengths)))  # all positions, each time
    with pytest.raises(ValueError, match="without a cache texts are written greedily"):
        answerer.write(prefix, range(4), prompts, Decoding(num_beams=3), use_cache=False)


def test_learns_eight_pairs_by_heart_and_writes_them_back(make_picture):
    model = make_model(CaptionTask(), connector=Linear())
    captions = [
        "a red cat",
        "two blue dogs",
        "a cat",
        "dogs on the left",
        "no cats",
        "a blue cat",
        "two",
        "the dog",
    ]
    files = [make_picture(seed) for seed in range(8)]
    images = torch.stack([model.encoder.preprocess(file) for file in files])
    frozen = {name: value.clone() for name, value in model.image_tower.state_dict().items()}
    batch = pack([make_pair(model.tokenizer, "", text) for text in captions], model.tokenizer.pad_token_id)
    words = (batch["labels"] != IGNORED).sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    model.train()
    losses = []
    for _ in range(60):
        loss = model(images=images, image_of_text=torch.arange(8), **batch) / words
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
    model.eval()
    assert model.caption(files) == captions
    assert model.caption([]) == []
    for name, value in model.image_tower.state_dict().items():
        assert torch.equal(value, frozen[name]), f"{name} of the frozen tower moved"


@pytest.mark.parametrize("tower", [VIT, ResNet(image_size=32, width=8)])
def test_every_part_that_trains_gets_a_gradient(files, tower):
    connector = Mlp(merge=1)
    model = make_model(CaptionTask(), tower=tower, connector=connector, freeze_image_tower=False).train()
    assert not model.image_tower.training  # batch statistics stay
    images = torch.stack([model.encoder.preprocess(file) for file in files])
    batch = pack([make_pair(model.tokenizer, "", text) for text in WORDS[:4]], model.tokenizer.pad_token_id)
    model(images=images, image_of_text=torch.arange(4), **batch).backward()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(name.startswith("image_tower.") for name in names)
    assert not [
        name for name, value in model.named_parameters() if value.requires_grad and value.grad is None
    ]


def test_kept_tokens_give_the_loss_of_the_pictures(answerer, files):
    images = torch.stack([answerer.encoder.preprocess(file) for file in files])
    batch = pack([make_pair(answerer.tokenizer, "dog?", "yes")] * 4, answerer.tokenizer.pad_token_id)
    batch["image_of_text"] = torch.arange(4)
    with torch.no_grad():
        direct = answerer(images=images, **batch)
        kept = answerer(tokens=answerer.image_tokens(images), **batch)
    assert torch.equal(direct, kept)


def test_saved_and_opened_again_it_writes_the_same(answerer, files, tmp_path):
    questions = ["dog?", "is there a red cat?", "how many?", "two"]
    folder = answerer.save(tmp_path / "model")
    opened = load_task_model(folder, device="cpu")
    assert opened.answer(files, questions) == answerer.answer(files, questions)
    assert {path.suffix for path in folder.rglob("*.*")} <= {".json", ".safetensors", ".md", ".txt", ".jinja"}
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert load_task_model(moved, device="cpu").answer(files, questions) == answerer.answer(files, questions)


def test_damaged_models_are_refused(answerer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no task model.*task\.json"):
        load_task_model(tmp_path)
    folder = answerer.save(tmp_path / "model")
    content = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_task_model(folder)
    (folder / "task.json").write_text(json.dumps(content))
    weights = folder / "connector.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or missing"):
        load_task_model(folder)


def test_parts_of_two_models_are_refused(answerer, files, tmp_path):
    folder = answerer.save(tmp_path / "model")
    shutil.rmtree(folder / "encoder")
    make_encoder(ViT(image_size=32, patch_size=8, width=16, layers=1, head_width=16)).save(folder / "encoder")
    with pytest.raises(
        ValueError, match="the connector does not fit the encoder and the language model beside it"
    ):
        load_task_model(folder, device="cpu")


def test_weights_that_are_not_finite_write_nothing(files):
    model = make_model(VqaTask())
    with torch.no_grad():
        next(iter(model.image_tower.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="makes NaN or infinite numbers of these pictures"):
        model.answer(files[:1], ["dog?"])


def test_a_failure_leaves_the_model_in_its_mode(answerer, files, monkeypatch):
    def fail(**keys):
        raise MemoryError("no room")

    looked = []
    monkeypatch.setattr(answerer.language_model, "generate", fail)
    monkeypatch.setattr(answerer.connector, "look", lambda *given: looked.append(given[0] is None))
    answerer.train()
    try:
        with pytest.raises(MemoryError):
            answerer.answer(files[:1], ["is it red?"])
        assert answerer.training
        assert looked[-1]
    finally:
        answerer.eval()


def test_bad_questions(answerer, files):
    with pytest.raises(ValueError, match="empty question"):
        answerer.answer(files[:1], ["  "])
    with pytest.raises(ValueError, match="one question for each picture"):
        answerer.answer(files, ["dog?"])
    with pytest.raises(ValueError, match=r"the prompt does not fit: 4 positions .* has 64"):
        answerer.answer(files[:1], ["many " * 60])
    with pytest.raises(ValueError, match="use answer"):
        answerer.caption(files)
    with pytest.raises(ValueError, match="use caption"):
        make_model(CaptionTask()).answer(files[:1], ["dog?"])


@pytest.mark.parametrize("answers", ["yes", 3, {"answer": "yes"}, [], None, ["half \ud800 a character"]])
def test_answers_are_a_list(answers):
    """The letters of a text are no answers."""
    sample = RawSample(
        "k", "s", 0, b"", "jpg", {"questions": [{"question": "is it red?", "answers": answers}]}
    )
    with pytest.raises(Fault, match=r"bad_question: question 0 has no answers"):
        read_questions(sample)


def test_a_picture_that_fills_the_context_is_refused():
    tokenizer = train_tokenizer(WORDS, 300)
    model = small_language_model(SmallLanguageModel(width=32, layers=1, heads=2, context=12), tokenizer)
    with pytest.raises(ValueError, match=r"picture alone takes 16 positions of the language model's 12"):
        VisionLanguageModel(make_encoder(), Linear(), model, tokenizer, CaptionTask(), Decoding())


def test_a_language_model_without_padding_or_end():
    tokenizer = train_tokenizer(WORDS, 300)
    tokenizer.pad_token = None
    assert require_end_and_pad(tokenizer, "lm").pad_token == END
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="lm has neither an end nor a padding token"):
        require_end_and_pad(tokenizer, "lm")


def test_a_pretrained_language_model_from_a_folder(answerer, tmp_path):
    answerer.language_model.save_pretrained(tmp_path)
    answerer.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = pretrained_language_model(str(tmp_path))
    assert tokenizer.get_vocab() == answerer.tokenizer.get_vocab()
    assert torch.equal(
        model.get_input_embeddings().weight, answerer.language_model.get_input_embeddings().weight
    )
    with pytest.raises(ValueError, match="expected a folder or hub name of a causal language model"):
        pretrained_language_model(str(tmp_path / "nothing"))


def test_neighbours_are_merged_in_the_plane():
    grid = torch.arange(16).reshape(1, 16, 1).float()  # 4 x 4, row by row
    merged = merge_neighbours(grid, (4, 4), 2)
    assert merged[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_grids_and_what_does_not_divide_them():
    assert token_grid(16, (32, 32)) == (4, 4)
    assert token_grid(8, (32, 64)) == (2, 4)
    assert token_grid(17, (32, 32)) == (1, 17)  # a class token among them
    with pytest.raises(ValueError, match=r"merge 3 does not divide .* 4 x 4"):
        build_connector(Mlp(merge=3), grid=(4, 4), token_dim=8, width=8)


def test_one_pixel_pictures_are_pictures(answerer):
    tiny = torch.from_numpy(np.full((3, 1, 1), 200, dtype=np.uint8))
    assert len(answerer.answer([tiny], ["dog?"])) == 1

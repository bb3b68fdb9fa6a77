"""Consistency: what perfect, random and contrary models score, and changed captions."""

from __future__ import annotations

import json
import random

import pytest
import torch

from data.scenes.vocabulary import kinds
from data.shards import ShardWriter
from explain.cli import main
from explain.consistency import check_consistency
from explain.consistency_page import consistency_report, sound, summary_lines
from explain.edits import deny, mirror, swap_colours, swap_sides
from explain.encoder_checks import neighbour_overlap
from explain.findings import at_chance, own_ranks, read_pairs, shown_objects
from explain.task_checks import object_names, object_tokens


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    from data.adapters.scenes import samples

    folder = tmp_path_factory.mktemp("scenes")
    with ShardWriter(folder, samples_per_shard=30) as writer:
        for sample in samples("val", count=24, size=48):
            writer.write(sample)
    return folder


class Written:
    """A captioner that knows the pictures' own captions by heart, or always says the same."""

    def __init__(self, encoder, pairs, constant=None):
        self.encoder, self.constant = encoder, constant
        self.known = {}
        for pair in pairs:
            image = encoder.preprocess(pair.file)
            for each in (image, image.flip(-1)):
                self.known[each.numpy().tobytes()] = pair.captions[0]

    def caption(self, images):
        return [self.constant or self.known[image.numpy().tobytes()] for image in images]


class Answerer:
    """Says whether a caption known by heart names it, or always the same."""

    def __init__(self, written, names, constant=None):
        self.encoder, self.written, self.names, self.constant = written.encoder, written, names, constant

    def answer(self, images, questions):
        if self.constant:
            return [self.constant] * len(images)
        from finetune.diversity import chair

        found = []
        for text, question in zip(self.written.caption(images), questions, strict=True):
            named = chair([object_tokens(text, self.names)], [[]], self.names)["hallucinated"]
            asked = chair([object_tokens(question, self.names)], [[]], self.names)["hallucinated"]
            found.append("Yes" if set(asked) <= set(named) else "no")
        return found


@pytest.fixture(scope="module")
def paired(explained, scenes):
    """An encoder for which each picture's row is the row of its first caption."""
    encoder = explained["vit"]
    pairs = read_pairs([str(scenes)], 24)
    rows = {encoder.preprocess(p.file).numpy().tobytes(): p.captions[0] for p in pairs}
    rows |= {encoder.preprocess(p.file).flip(-1).numpy().tobytes(): p.captions[0] for p in pairs}

    class Perfect:
        name, image_size = "perfect", encoder.image_size
        preprocess = staticmethod(encoder.preprocess)
        encode_texts = staticmethod(encoder.encode_texts)

        @staticmethod
        def encode_images(images):
            return encoder.encode_texts([rows[image.numpy().tobytes()] for image in images])

    return Perfect(), pairs


def test_perfect_models_agree_and_shuffled_captions_are_at_chance(paired, scenes):
    encoder, pairs = paired
    writer = Written(encoder, pairs)
    found = check_consistency(
        encoder, [str(scenes)], captioner=writer, vqa=Answerer(writer, object_names(pairs)), seed=3
    )
    checks = {name: check["value"] for name, check in found.numbers["checks"].items()}
    assert checks["caption_finds_picture@1"] == pytest.approx(1)
    assert checks["caption_finds_picture_mrr"] == pytest.approx(1)
    assert checks["mirror_finds_picture"] == 1
    assert checks["image_text_neighbours"] == pytest.approx(1)
    assert checks["negation_right"] == 1
    assert checks["colours_right"] > 0.8  # a tie where the context of 16 tokens ends before the colour
    assert checks["vqa_agreement"] == 1
    assert checks["vqa_contradiction"] == 0
    assert checks["vqa_paraphrase_same"] == checks["vqa_mirror_same"] == 1
    assert found.numbers["chair"]["chair_i"] == 0
    for control in ("shuffled_captions", "shuffled_data_captions"):
        shuffled = found.numbers["controls"][control]
        assert shuffled["at_chance"]
        assert shuffled["recall@1"] < 0.3
    assert sound(found.numbers)
    shuffled["at_chance"] = False
    assert not sound(found.numbers)
    assert "NOT AT CHANCE" in "".join(summary_lines(found.numbers))
    assert found.numbers["controls"]["vqa_agreement_shuffled_pictures"] < 0.8
    assert not found.worst["Captions that do not find their picture"]


def test_models_that_do_not_look_score_at_chance(paired, scenes):
    encoder, pairs = paired
    writer = Written(encoder, pairs, constant="a top hat")
    found = check_consistency(encoder, [str(scenes)], captioner=writer, vqa=Answerer(writer, {}, "yes"))
    checks = found.numbers["checks"]
    for name in ("caption_finds_picture@1", "caption_finds_picture_mrr"):
        assert checks[name]["value"] == pytest.approx(checks[name]["chance"], rel=0.01)
    assert checks["caption_gain"]["value"] == pytest.approx(0, abs=0.05)
    assert checks["vqa_agreement"]["value"] == pytest.approx(0.5)
    assert found.worst["Captions that do not find their picture"]
    page = consistency_report(found)
    lines = "\n".join(summary_lines(found.numbers))
    assert "at chance" in lines
    assert "CHAIR" in lines
    assert any(block["kind"] == "cards" for block in page.blocks)
    contrary = check_consistency(encoder, [str(scenes)], vqa=Answerer(writer, {}, "no"))
    assert contrary.numbers["checks"]["vqa_contradiction"]["value"] == 1
    assert contrary.worst["Answers that deny the caption"]
    assert contrary.numbers["left_out"]["chair"] == "no --captioner was given"


def test_a_ranking_that_is_not_random_is_noticed():
    assert not at_chance(torch.zeros(100, dtype=torch.float64))["at_chance"]
    assert at_chance(torch.randperm(100).double())["at_chance"]
    rows = torch.eye(4)
    assert own_ranks(rows, rows, torch.arange(4)).tolist() == [0, 0, 0, 0]
    assert own_ranks(rows, torch.ones(4, 4) / 2, torch.arange(4)).tolist() == [1.5] * 4  # all tie


def test_neighbours_by_hand():
    rows = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1
    )
    assert neighbour_overlap(rows, rows, 1).tolist() == [1, 1, 1, 1]
    assert neighbour_overlap(rows, rows[[0, 2, 1, 3]], 1).tolist() == [0, 0, 0, 0]


def test_a_colour_is_no_fruit_and_a_starry_night_has_stars():
    names = object_names([])
    assert object_tokens("an orange next to two orange hearts", names) == "an orange next to two hearts"
    assert object_tokens("an orange book and a circle", names) == "an book and a circle"
    record = {"objects": [{"name": "cow"}], "background": {"name": "night", "colour": None}}
    assert shown_objects(record) == ["cow", "star"]
    assert shown_objects({"caption": "a cow"}) is None


def test_changed_captions():
    assert swap_sides("Left of it, a cat on the right.") == "right of it, a cat on the left."
    assert swap_sides("a cat") is None
    assert mirror("a cat") == "a cat"
    assert deny("An orange on a table") == "no orange on a table"
    assert deny("cats") is None
    assert (
        swap_colours("a red car, a blue one and a red one", random.Random(0))
        == "a blue car, a red one and a blue one"
    )
    only = swap_colours("a red car", random.Random(0))
    assert only is not None
    assert "red" not in only
    assert swap_colours("an orange", random.Random(0)) is None
    assert object_names([])["smiley"] == "grinning face"
    assert len(kinds()) > 50


def test_the_command_writes_numbers_and_a_report(explained, scenes, tmp_path, capsys):
    folder = explained["vit"].save(tmp_path / "model")
    call = ["consistency", "--model", str(folder), "--data", str(scenes), "--device", "cpu"]
    assert main([*call, "--out", str(tmp_path / "out"), "--limit", "10"]) == 0
    numbers = json.loads((tmp_path / "out" / "consistency.json").read_text())
    assert numbers["pictures"] == 10
    assert (tmp_path / "out" / "report.html").is_file()
    assert "Not checked, since no --vqa was given: vqa" in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    with pytest.raises(FileExistsError, match="holds a training run, whose report would be lost"):
        main([*call, "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="1 pictures with captions, expected at least two"):
        read_pairs_of_one(tmp_path, scenes)


def read_pairs_of_one(tmp_path, scenes):
    from data.adapters.scenes import samples

    with ShardWriter(tmp_path / "one", samples_per_shard=1) as writer:
        for sample in samples("val", count=1, size=48):
            writer.write(sample)
    return read_pairs([str(tmp_path / "one")], 10)

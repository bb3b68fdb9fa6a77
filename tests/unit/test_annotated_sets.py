"""Annotated sets on small copies of their real layouts, each with a missing picture and a broken row."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.adapters import (
    coco,
    gqa,
    hateful_memes,
    img2dataset,
    mvsa,
    nlvr,
    nocaps,
    okvqa,
    textvqa,
    visual_genome,
    vizwiz,
)
from data.adapters.common import Skipped
from data.prepare import prepare
from data.shards import Sample, ShardWriter


def split_up(items) -> tuple[list[Sample], list[Skipped]]:
    rows = list(items)
    return [row for row in rows if isinstance(row, Sample)], [row for row in rows if isinstance(row, Skipped)]


def causes(faults: list[Skipped]) -> list[tuple[str, str]]:
    return [(fault.cause, fault.where) for fault in faults]


@pytest.fixture
def put(tmp_path: Path, make_picture):
    """`put("folder/a.jpg")` writes a picture, `put("x.json", {...})` JSON, `put("x.txt", "...")` text."""

    def write(name: str, content: Any = None, size: tuple[int, int] = (48, 48)) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.write_bytes(make_picture(sum(map(ord, name)), size))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def ten(answer: str) -> list[dict]:
    return [{"answer": answer, "raw_answer": answer, "answer_id": number} for number in range(1, 11)]


def test_okvqa(put, tmp_path: Path) -> None:
    put("train2014/COCO_train2014_000000000051.jpg")
    asked = [{"image_id": image, "question": "What for?", "question_id": image * 10} for image in (51, 52)]
    put("OpenEnded_mscoco_train2014_questions.json", {"questions": [*asked, {"image_id": 51}]})
    answered = [{"image_id": image, "question_id": image * 10, "question_type": "four", "answer_type": "other",
                 "answers": ten("race")} for image in (51, 52)]  # fmt: skip
    put("mscoco_train2014_annotations.json", {"annotations": answered})
    samples, faults = split_up(okvqa.samples(tmp_path))
    assert [sample.key for sample in samples] == ["COCO_train2014_000000000051"]
    assert samples[0].meta["questions"] == [
        {"question_id": 510, "question": "What for?", "answers": ["race"] * 10, "answer_type": "other",
         "question_type": "four"}
    ]  # fmt: skip
    name = "OpenEnded_mscoco_train2014_questions.json: questions"
    assert causes(faults) == [("bad_row", f"{name}[2]"), ("missing_image", f"{name}[1]")]
    with pytest.raises(ValueError, match="okvqa has no split 'test': expected one of train, val"):
        okvqa.samples(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="no val questions of OK-VQA in"):
        okvqa.samples(tmp_path, "val")


def test_gqa(put, tmp_path: Path) -> None:
    put("images/2405722.jpg")
    question = {"imageId": "2405722", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes, it is.",
                "isBalanced": True, "types": {"structural": "verify", "semantic": "attr"}}  # fmt: skip
    put(
        "train_balanced_questions.json",
        {"1": question, "2": {**question, "answer": "cup"}, "3": {**question, "imageId": "9"}, "4": {"imageId": "5"},
         "5": {**question, "answer": ""}},
    )  # fmt: skip
    samples, faults = split_up(gqa.samples(tmp_path))
    assert [entry["question_id"] for entry in samples[0].meta["questions"]] == ["1", "2"]
    first, second = samples[0].meta["questions"]
    assert first["answers"] == ["yes"] * 10
    assert first["full_answer"] == "Yes, it is."
    assert (first["answer_type"], first["question_type"], second["answer_type"]) == (
        "yes/no",
        "verify",
        "other",
    )
    name = "train_balanced_questions.json: "
    assert causes(faults) == [
        ("bad_row", f"{name}4"), ("missing_answer", f"{name}5"), ("missing_image", f"{name}3")
    ]  # fmt: skip
    put("test_all_questions.json", {"7": {"imageId": "2405722", "question": "What?"}})
    assert split_up(gqa.samples(tmp_path, "test"))[0][0].meta["questions"] == [
        {"question_id": "7", "question": "What?"}
    ]
    put("val_balanced_questions.json", [])
    with pytest.raises(ValueError, match="expected one object with questions by their id, got list"):
        gqa.samples(tmp_path, "val")


def test_textvqa(put, tmp_path: Path) -> None:
    put("train_images/0054c91397f2fe05.jpg")
    row = {"question_id": 0, "question": "what brand?", "image_id": "0054c91397f2fe05", "answers": ["nokia"] * 10,
           "flickr_original_url": "https://farm/1.jpg"}  # fmt: skip
    put(
        "TextVQA_0.5.1_train.json",
        {
            "data": [
                row,
                {**row, "question_id": 1, "answers": ["x"]},
                {**row, "question_id": 2, "image_id": "gone"},
                {},
            ]
        },
    )
    samples, faults = split_up(textvqa.samples(tmp_path))
    assert samples[0].meta["questions"] == [
        {"question_id": 0, "question": "what brand?", "answers": ["nokia"] * 10}
    ]
    assert samples[0].meta["url"] == "https://farm/1.jpg"
    name = "TextVQA_0.5.1_train.json: data"
    assert causes(faults) == [
        ("missing_answer", f"{name}[1]"), ("bad_row", f"{name}[3]"), ("missing_image", f"{name}[2]")
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"no val questions of TextVQA .*TextVQA_0.5.1_val.json"):
        textvqa.samples(tmp_path, "val")


def test_vizwiz_questions_and_captions(put, tmp_path: Path) -> None:
    put("train/VizWiz_train_00000000.jpg")
    row = {"image": "VizWiz_train_00000000.jpg", "question": "What is it?", "answers": ten("basil leaves"),
           "answer_type": "other", "answerable": 1}  # fmt: skip
    put(
        "Annotations/train.json",
        [row, {**row, "image": "gone.jpg"}, {"question": "?"}, {**row, "answers": []}],
    )
    samples, faults = split_up(vizwiz.samples(tmp_path))
    assert samples[0].meta["questions"] == [
        {"question_id": "VizWiz_train_00000000", "question": "What is it?", "answers": ["basil leaves"] * 10,
         "answer_type": "other", "answerable": 1}
    ]  # fmt: skip
    assert causes(faults) == [
        ("bad_row", "train.json[2]"), ("missing_answer", "train.json[3]"), ("missing_image", "train.json[1]")
    ]  # fmt: skip
    put("val/VizWiz_val_00000000.jpg")
    notes = [
        {"image_id": 1, "caption": "Ibuprofen bottle", "is_rejected": False, "is_precanned": False},
        {
            "image_id": 1,
            "caption": "Quality issues are too severe",
            "is_rejected": False,
            "is_precanned": True,
        },
        {"image_id": 1, "caption": "bad", "is_rejected": True, "is_precanned": False},
        {"image_id": 1},
    ]
    images = [{"id": 1, "file_name": "VizWiz_val_00000000.jpg"}, {"id": 2}]
    put("Annotations/val.json", {"images": images, "annotations": notes})
    samples, faults = split_up(vizwiz.samples(tmp_path, "val"))
    assert samples[0].captions == ["Ibuprofen bottle"]
    assert causes(faults) == [("bad_row", "val.json: annotations[3]"), ("bad_row", "val.json: images[1]")]
    put("test/VizWiz_test_00000000.jpg")
    put("Annotations/test.json", {"images": images})
    with pytest.raises(ValueError, match="captions of this split are not public"):
        vizwiz.samples(tmp_path, "test")
    put("Annotations/test.json", [1])
    with pytest.raises(ValueError, match="expected a list of questions, but the file has list"):
        vizwiz.samples(tmp_path, "test")


def test_nocaps(put, tmp_path: Path) -> None:
    put("validation/0013ea2087020901.jpg")
    image = {
        "id": 0,
        "open_images_id": "0013ea2087020901",
        "domain": "in-domain",
        "file_name": "0013ea2087020901.jpg",
    }
    notes = [{"image_id": 0, "id": number, "caption": f"caption {number}"} for number in range(10)]
    put("nocaps_val_4500_captions.json",
        {"images": [image, {**image, "id": 1, "file_name": "gone.jpg"}, {}],
         "annotations": [*notes, {"image_id": 1, "caption": "lost"}, {"id": 3}]})  # fmt: skip
    samples, faults = split_up(nocaps.samples(tmp_path))
    assert samples[0].captions == [f"caption {number}" for number in range(10)]
    assert samples[0].meta["domain"] == "in-domain"
    name = "nocaps_val_4500_captions.json: "
    assert causes(faults) == [
        ("bad_row", f"{name}annotations[11]"), ("bad_row", f"{name}images[2]"), ("missing_image", f"{name}images[1]")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="nocaps has no split 'train'"):
        nocaps.samples(tmp_path, "train")


def test_hateful_memes(put, tmp_path: Path) -> None:
    put("img/42953.png")
    row = {"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character"}
    put("train.jsonl", lines(row, {**row, "img": "img/1.png"}, "{cut", {**row, "label": 7}, "[1]"))
    samples, faults = split_up(hateful_memes.samples(tmp_path))
    assert [(s.captions, s.meta["label"], s.meta["text"]) for s in samples] == [
        (["its their character"], "not hateful", "its their character")
    ]
    assert causes(faults) == [
        ("bad_row", "train.jsonl:3"), ("bad_row", "train.jsonl:5"), ("bad_row", "train.jsonl:4"),
        ("missing_image", "train.jsonl:2"),
    ]  # fmt: skip
    del row["label"]
    put("test.jsonl", lines(row))
    assert "label" not in split_up(hateful_memes.samples(tmp_path, "test"))[0][0].meta
    with pytest.raises(
        FileNotFoundError, match=r"no dev split of Hateful Memes .*dev_seen.jsonl or dev.jsonl"
    ):
        hateful_memes.samples(tmp_path, "dev")


def test_mvsa_single_merges_labels(put, tmp_path: Path) -> None:
    judged = {
        1: "neutral,positive",
        2: "negative,positive",
        3: "negative,neutral",
        4: "neutral,neutral",
        5: "positive,positive",
    }
    for number in judged:
        put(f"data/{number}.jpg")
        put(f"data/{number}.txt", f"tweet \xe9 {number} \n".encode("latin-1"))
    (tmp_path / "data/5.jpg").unlink()
    rows = "".join(f"{number}\t{labels}\n" for number, labels in judged.items())
    put("labelResultAll.txt", "ID\ttext,image\n" + rows + "6\tgood,positive\n7\tpositive,positive\n")
    samples, faults = split_up(mvsa.single(tmp_path, "all"))
    assert [(sample.key, sample.meta["label"]) for sample in samples] == [
        ("1", "positive"), ("3", "negative"), ("4", "neutral")
    ], "2 contradicts itself and is left out"  # fmt: skip
    assert samples[0].meta["text"] == samples[0].captions[0] == "tweet é 1"
    assert (samples[0].meta["text_label"], samples[0].meta["image_label"]) == ("neutral", "positive")
    assert causes(faults) == [
        ("bad_row", "labelResultAll.txt:7"), ("missing_caption", "labelResultAll.txt:8"),
        ("missing_image", "labelResultAll.txt:6"),
    ]  # fmt: skip
    parts = [{s.key for s in split_up(mvsa.single(tmp_path, part))[0]} for part in ("train", "val", "test")]
    assert set.union(*parts) == {"1", "3", "4"}
    assert sum(map(len, parts)) == 3
    drawn = [mvsa.split_of(str(number)) for number in range(10_000)]
    assert [round(drawn.count(part) / 1000) for part in ("train", "val", "test")] == [8, 1, 1]


def test_mvsa_multiple_takes_the_majority(put, tmp_path: Path) -> None:
    head = "ID\ttext,image\ttext,image\ttext,image\n"
    put("labelResultAll.txt", head + "10\tpositive,neutral\tneutral,neutral\tpositive,positive\n"
        "11\tpositive,neutral\tneutral,neutral\tnegative,neutral\n")  # fmt: skip
    for number in (10, 11):
        put(f"data/{number}.jpg")
        put(f"data/{number}.txt", "tweet ü")
    samples, faults = split_up(mvsa.multiple(tmp_path, "all"))
    assert [(s.key, s.meta["label"], s.meta["text_label"], s.meta["image_label"]) for s in samples] == [
        ("10", "positive", "positive", "neutral")
    ], "three different labels are none"
    assert faults == []
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"no folder of tweets .*expected data/ beside labelResultAll.txt"
    ):
        mvsa.multiple(tmp_path)
    with pytest.raises(ValueError, match="mvsa_multiple has no split 'dev'"):
        mvsa.multiple(tmp_path, "dev")


def test_nlvr2_puts_two_photographs_side_by_side(put, tmp_path: Path) -> None:
    put("images/train/71/train-10171-0-img0.png", size=(60, 40))
    put("images/train/71/train-10171-0-img1.png", size=(100, 80))
    put("images/train/71/train-10171-1-img0.png")
    row = {
        "identifier": "train-10171-0-0",
        "sentence": "There are two dogs.",
        "label": "True",
        "directory": 71,
    }
    half = {**row, "identifier": "train-10171-1-0", "label": "False"}
    put(
        "data/train.json",
        lines(row, {**row, "identifier": "train-10171-0-1", "label": "False"}, half, {"label": "True"}),
    )
    samples, faults = split_up(nlvr.nlvr2(tmp_path))
    assert [(sample.key, sample.meta["label"]) for sample in samples] == [
        ("train-10171-0-0", "true"), ("train-10171-0-1", "false")
    ]  # fmt: skip
    picture = Image.open(io.BytesIO(samples[0].image))
    assert picture.size == (60 + nlvr.GAP + 50, 40)
    assert picture.getpixel((60 + nlvr.GAP // 2, 20)) == pytest.approx((255, 255, 255), abs=12)
    assert samples[0].meta["questions"][0]["answers"] == ["true"] * 10
    assert samples[0].captions == []
    assert samples[0].meta["text"] == "There are two dogs."
    assert causes(faults) == [("bad_row", "train.json:4"), ("missing_image", "train.json:3")]
    assert "train-10171-1-img1.png" in faults[1].why
    put("dev/dev-1-0-img0.png")
    put("dev/dev-1-0-img1.png", b"not a picture")
    put("data/dev.json", lines({**row, "identifier": "dev-1-0-0"}))
    samples, faults = split_up(nlvr.nlvr2(tmp_path, "val"))
    assert causes(faults) == [("undecodable_image", "dev.json:1")]


def test_nlvr_has_six_orders_of_each_drawing(put, tmp_path: Path) -> None:
    for order in range(5):
        put(f"dev/images/3/dev-72-0-{order}.png")
    row = {
        "identifier": "72-0",
        "sentence": "A tower.",
        "label": "false",
        "directory": "3",
        "structured_rep": [],
    }
    put("dev/dev.json", lines(row, {**row, "label": "maybe"}))
    samples, faults = split_up(nlvr.nlvr(tmp_path, "val"))
    assert [sample.key for sample in samples] == [f"dev-72-0-{order}" for order in range(5)]
    assert samples[0].meta["image_id"] == "72-0"
    assert causes(faults) == [("bad_row", "dev.json:2"), ("missing_image", "dev.json:1")]


def vg_region(number: int, phrase: str, box: tuple[int, int, int, int]) -> dict:
    return {
        "region_id": number,
        "image_id": 1,
        "phrase": phrase,
        **dict(zip(("x", "y", "width", "height"), box, strict=True)),
    }


@pytest.fixture
def genome(put, tmp_path: Path) -> Path:
    put("VG_100K/1.jpg", size=(100, 80))
    put("VG_100K_2/2.jpg")
    put(
        "region_descriptions.json",
        [
            {"id": 1, "regions": [vg_region(7, "the sky ", (0, 0, 50, 20)), vg_region(8, "a  dog", (60, 40, 80, 80)),
                                  vg_region(9, "the sky", (1, 1, 5, 5)), {"phrase": "no box"}]},
            {"id": 2, "regions": [vg_region(10, "a cat", (0, 0, 30, 30))]},
            {"id": 3, "regions": [vg_region(11, "gone", (0, 0, 30, 30))]},
            {"regions": []},
        ],
    )  # fmt: skip
    return tmp_path


def test_visual_genome(genome: Path, put) -> None:
    samples, faults = split_up(visual_genome.samples(genome))
    assert [(s.key, s.captions) for s in samples] == [("1", ["the sky", "a dog"]), ("2", ["a cat"])]
    assert samples[0].meta["regions"][1] == {"region_id": 8, "phrase": "a dog", "box": [60, 40, 80, 80]}
    name = "region_descriptions.json"
    assert causes(faults) == [
        ("bad_row", f"{name}[0].regions[3]"), ("bad_row", f"{name}[3]"), ("missing_image", f"{name}[2]")
    ]  # fmt: skip
    put(
        "question_answers.json",
        [{"id": 1, "qas": [{"qa_id": 5, "question": "What colour?", "answer": "Blue."}, {}]}],
    )
    put("image_data.json", [{"image_id": 1, "coco_id": 77}, {"image_id": 2, "coco_id": None}])
    samples, faults = split_up(visual_genome.samples(genome))
    assert samples[0].meta["questions"] == [
        {"question_id": 5, "question": "What colour?", "answers": ["Blue"] * 10, "question_type": "what"}
    ]
    assert samples[0].meta["coco_id"] == 77
    assert "coco_id" not in samples[1].meta
    assert ("bad_row", "question_answers.json[0].qas[1]") in causes(faults)


def test_visual_genome_cuts_regions_out(genome: Path) -> None:
    samples, faults = split_up(visual_genome.samples(genome, crops=True))
    assert [(s.key, s.captions) for s in samples] == [
        ("1-000", ["the sky"]),
        ("1-001", ["a dog"]),
        ("2-000", ["a cat"]),
    ]
    sizes = [Image.open(io.BytesIO(sample.image)).size for sample in samples]
    assert sizes == [(50, 20), (40, 40), (30, 30)], "a box may reach over the edge; one of 5 x 5 is left out"
    assert [fault.cause for fault in faults] == ["bad_row", "bad_row", "missing_image"]
    (genome / "region_descriptions.json").unlink()
    with pytest.raises(FileNotFoundError, match="no regions of Visual Genome in"):
        visual_genome.samples(genome, crops=True)


@pytest.fixture
def fetched(tmp_path: Path, make_picture) -> Path:
    """A folder as img2dataset leaves it, with the scores that a later step has joined to the parquet file."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "fetched"
    with ShardWriter(folder, samples_per_shard=10) as writer:
        for number in range(3):
            meta = {
                "url": f"http://a/{number}.jpg",
                "key": f"00000000{number}",
                "status": "success",
                "exif": "{}",
            }
            writer.write(Sample(f"00000000{number}", make_picture(number), "jpg", [f"text {number}"], meta))
        writer.write(Sample("000000003", make_picture(9), "jpg", []))
    keys = [f"00000000{number}" for number in (0, 1, 2, 4, 5)]
    rows = {"key": keys, "status": ["success"] * 4 + ["failed_to_download"], "punsafe": [0.1, 0.2, 0.3, 0.4, None],
            "similarity": [0.3] * 5}  # fmt: skip
    pq.write_table(pa.table(rows), folder / "00000.parquet")
    return folder


@pytest.mark.parametrize("adapter", [img2dataset.laion, img2dataset.conceptual_captions, img2dataset.sbu])
def test_what_img2dataset_wrote(fetched: Path, adapter) -> None:
    samples, faults = split_up(adapter(fetched))
    assert [(s.key, s.captions, s.meta["punsafe"]) for s in samples] == [
        (f"00000000{number}", [f"text {number}"], (number + 1) / 10) for number in range(3)
    ]
    assert samples[0].meta == {"url": "http://a/0.jpg", "punsafe": 0.1, "similarity": 0.3}
    assert causes(faults) == [
        ("missing_caption", "00000.tar: 000000003"), ("missing_image", "00000.tar: 000000004")
    ]  # fmt: skip


def test_what_else_lies_in_shards_and_their_parquet(tmp_path: Path, make_picture) -> None:
    """Keys with folders in them, values that JSON cannot hold, and a shard that is not there."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in {
            "0/a b.jpg": make_picture(0),
            "0/a b.txt": b"text",
            "0/a b.json": b'{"x": NaN}',
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    columns = {
        "similarity": [float("nan")],
        "seen": [datetime(2020, 1, 2)],
        "raw": [b"\xff"],
        "near": [[0.5]],
    }
    pq.write_table(pa.table({"key": ["0/a b"], **columns}), tmp_path / "00000.parquet")
    (tmp_path / "00001.tar").symlink_to("gone.tar")
    (sample,), (fault,) = split_up(img2dataset.laion(tmp_path))
    assert (sample.key, sample.meta) == ("0_a_b", {"seen": "2020-01-02 00:00:00", "near": [0.5]})
    assert (fault.cause, fault.where) == ("unreadable_shard", "00001.tar")
    assert prepare("laion", root=tmp_path, out=tmp_path / "out", max_faults=0.5, quiet=True).samples == 1


def test_conceptual_captions_as_files_and_as_a_list(put, tmp_path: Path) -> None:
    put("a/00000/000000000.jpg")
    put("a/00000/000000000.txt", "from the text")
    put("a/00000/000000001.jpg")
    put("a/00000/000000001.json", {"caption": "from the JSON", "url": "http://a/1", "status": "success"})
    put("a/00000/000000002.jpg")
    put("a/00000/000000003.jpg")
    put("a/00000/000000003.json", "{cut")
    put("a/00000/000000004.jpg")
    put("a/00000/000000004.json", {"caption": ["a", "list"]})
    put("a/00000/000000005.jpg")
    put("a/00000/000000005.json", "[]")
    samples, faults = split_up(img2dataset.conceptual_captions(tmp_path / "a"))
    assert [sample.captions for sample in samples] == [["from the text"], ["from the JSON"]]
    assert samples[1].meta == {"name": "000000001.jpg", "url": "http://a/1"}
    assert causes(faults) == [("missing_caption", "00000/000000002.jpg")] + [
        ("bad_row", f"00000/00000000{number}.jpg") for number in (3, 4, 5)
    ]
    put("b/cc_data/train/0.jpg")
    put(
        "b/Train-GCC-training_output.csv",
        "title\tfilepath\na dog\tcc_data/train/0.jpg\nb\tgone.jpg\nbroken\n",
    )
    samples, faults = split_up(img2dataset.conceptual_captions(tmp_path / "b"))
    assert [sample.captions for sample in samples] == [["a dog"]]
    name = "Train-GCC-training_output.csv"
    assert causes(faults) == [("bad_row", f"{name}:4"), ("missing_image", f"{name}:3")]
    (tmp_path / "c").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no pictures of conceptual_captions .*pairstream data download"
    ):
        img2dataset.conceptual_captions(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="no tar file of laion"):
        img2dataset.laion(tmp_path / "c")
    put("c/train.tsv", "x\ty\n1\t2\n")
    with pytest.raises(ValueError, match="expected the columns filepath and title"):
        img2dataset.conceptual_captions(tmp_path / "c")


def test_sbu_by_its_own_files(put, tmp_path: Path) -> None:
    urls = [f"http://static.flickr.com/2723/{name}.jpg" for name in ("4385058960_b0f", "gone_1")]
    put("images/4385058960_b0f.jpg")
    put("SBU_captioned_photo_dataset_urls.txt", "\n".join(urls))
    put("SBU_captioned_photo_dataset_captions.txt", "a man\nlost\n")
    samples, faults = split_up(img2dataset.sbu(tmp_path))
    assert [(s.captions, s.meta["url"]) for s in samples] == [(["a man"], urls[0])]
    assert causes(faults) == [("missing_image", "SBU_captioned_photo_dataset_urls.txt:2")]
    put("sbu-captions-all.json", {"image_urls": urls, "captions": ["a man", "lost"]})
    assert [s.captions for s in split_up(img2dataset.sbu(tmp_path))[0]] == [["a man"]]
    put("sbu-captions-all.json", {"image_urls": urls, "captions": ["a man"]})
    with pytest.raises(ValueError, match="2 URLs and 1 captions: expected as many"):
        img2dataset.sbu(tmp_path)
    put("sbu-captions-all.json", [])
    with pytest.raises(ValueError, match="expected an object with the lists image_urls and captions"):
        img2dataset.sbu(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hugging_face_sets(put, tmp_path: Path, make_picture, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    from data.adapters import hf

    put("own/train/1.jpg")
    put("own/train/2.jpg")
    put(
        "own/train/metadata.jsonl",
        lines({"file_name": "1.jpg", "text": "one", "score": 0.5}, {"file_name": "2.jpg", "text": " "}),
    )
    samples, faults = split_up(hf.samples(str(tmp_path / "own")))
    assert [(s.key, s.captions, s.meta) for s in samples] == [
        ("train-000000000", ["one"], {"name": "1.jpg", "score": 0.5})
    ]
    assert samples[0].image == (tmp_path / "own/train/1.jpg").read_bytes(), "the file as it is"
    assert causes(faults) == [("missing_caption", "train[1]")]
    features = datasets.Features(
        {"picture": datasets.Image(), "captions": datasets.Sequence(datasets.Value("string")),
         "label": datasets.ClassLabel(names=["cat", "dog"])}
    )  # fmt: skip
    picture = {"bytes": make_picture(1), "path": None}
    rows = {"picture": [picture, None], "captions": [["a", "b"], ["d"]], "label": [1, 0]}
    held = datasets.DatasetDict({"validation": datasets.Dataset.from_dict(rows, features)})
    held.save_to_disk(tmp_path / "saved")
    samples, faults = split_up(hf.samples(str(tmp_path / "saved"), "validation"))
    assert [(s.captions, s.meta) for s in samples] == [(["a", "b"], {"label": "dog"})]
    assert causes(faults) == [("missing_image", "validation[1]")]
    odd = [
        {"i": {"bytes": None, "path": str(tmp_path / "gone.jpg")}, "t": "x"},
        {"i": 7, "t": "x"},
        {"i": b"x", "t": 7},
    ]
    assert causes(split_up(hf.read(odd, "test", "i", ["t"], [], {}))[1]) == [
        ("missing_image", "test[0]"), ("missing_image", "test[1]"), ("bad_row", "test[2]")
    ]  # fmt: skip
    summary = prepare(
        f"hf:{tmp_path / 'saved'}", split="validation", out=tmp_path / "out", max_faults=0.9, quiet=True
    )
    assert (summary.samples, summary.captions) == (1, 2)
    for options, says in [
        ({"split": "train"}, "has no split 'train': it has validation"),
        (
            {"split": "validation", "caption_columns": ("caption",)},
            "no column 'caption': it has picture, captions",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            hf.samples(str(tmp_path / "saved"), **options)
    with pytest.raises(FileNotFoundError, match="no such folder, and no name on the hub looks like it"):
        hf.samples("./nowhere")
    with pytest.raises(ValueError, match="hf: needs a name or a folder"):
        prepare("hf:", out=tmp_path / "x", quiet=True)


@pytest.mark.parametrize("odd", [["a"], {"a": 1}, None, 1.5, True, "x" * 300])
def test_ids_and_names_of_a_wrong_kind_cost_their_row_and_no_more(put, tmp_path: Path, odd: Any) -> None:
    """Of two pictures each, of which the first has something odd for its id, split, folder or name."""
    names = ("a.jpg", "b.jpg")
    for folder in ("train2014", "train", "images/train/3"):
        for name in names:
            put(f"{folder}/{name}")
    images = [{"id": image, "file_name": name} for image, name in zip((odd, 2), names, strict=True)]
    captions = [{"image_id": image, "caption": "a text"} for image in (odd, 2)]
    put("captions_train2014.json", {"images": images, "annotations": captions})
    put("train.json", {"images": images, "annotations": captions})
    for samples in (coco.samples(tmp_path, "train2014"), vizwiz.samples(tmp_path)):
        found, faults = split_up(samples)
        assert [sample.meta["name"] for sample in found] == (["a.jpg", "b.jpg"] if odd is True else ["b.jpg"])
        assert {fault.cause for fault in faults} <= {"bad_row", "missing_caption"}
    good = {"filepath": "train2014", "split": "train", "sentences": [{"raw": "a text"}]}
    for key in ("filepath", "split", "filename"):
        rows = [{**good, "filename": "a.jpg", key: odd}, {**good, "filename": "b.jpg"}]
        put("dataset_coco.json", {"images": rows})
        if isinstance(odd, str):  # another split, a folder that is not there, a picture that is not
            continue
        found, faults = split_up(coco.samples(tmp_path))
        assert [sample.meta["name"] for sample in found] == ["b.jpg"]
        assert causes(faults) == [("bad_row", "dataset_coco.json: images[0]")]
    sentence = {"sentence": "s", "label": "True", "directory": odd}
    put("train.json", lines({"identifier": f"{odd}-0", **sentence}))
    _, faults = split_up(nlvr.nlvr2(tmp_path))
    assert faults[0].cause in ("missing_image", "unreadable_image")


def test_json_with_a_mark_of_its_encoding_and_json_without_end(put, tmp_path: Path) -> None:
    put("images/1.jpg")
    question = {"1": {"imageId": "1", "question": "Is it red?", "answer": "yes"}}
    put(
        "train_balanced_questions.json", b"\xef\xbb\xbf" + json.dumps(question).encode()
    )  # a Windows editor's
    assert len(split_up(gqa.samples(tmp_path))[0]) == 1
    put("train_balanced_questions.json", "[" * 100_000)
    with pytest.raises(ValueError, match="not a JSON file: maximum recursion depth"):
        gqa.samples(tmp_path)
    put("img/1.png")
    put("train.jsonl", lines({"img": "img/1.png", "text": "t", "label": 1}) + "[" * 100_000)
    samples, faults = split_up(hateful_memes.samples(tmp_path))
    assert (len(samples), causes(faults)) == (1, [("bad_row", "train.jsonl:2")])


def test_pictures_too_large_to_decode_cost_their_row(put, genome: Path, tmp_path: Path) -> None:
    """Where a picture is put together or cut, Pillow's own limit would end the preparation."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    bomb = bytearray(file.getvalue())  # now the header of a 30,000 x 30,000 picture
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    put("VG_100K/1.jpg", bytes(bomb))
    _, faults = split_up(visual_genome.samples(genome, crops=True))
    assert ("too_large_image", "region_descriptions.json[0]") in causes(faults)
    put("images/train/3/train-1-img0.png")
    put("images/train/3/train-1-img1.png", bytes(bomb))
    put("train.json", lines({"identifier": "train-1-0", "sentence": "s", "label": "True", "directory": 3}))
    assert causes(split_up(nlvr.nlvr2(tmp_path))[1]) == [("too_large_image", "train.json:1")]

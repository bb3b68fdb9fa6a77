"""The adapters of named sets, on small copies of their real layouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data.adapters import coco, easy_vqa, vqav2
from data.adapters.common import Skipped, need_folder, safe_key
from data.adapters.flickr import flickr8k, flickr30k
from data.shards import Sample


def split_up(items) -> tuple[list[Sample], list[Skipped]]:
    rows = list(items)
    return [row for row in rows if isinstance(row, Sample)], [row for row in rows if isinstance(row, Skipped)]


@pytest.fixture
def put(tmp_path: Path, make_picture):
    """`put("folder/a.jpg")` writes a picture, `put("x.json", {...})` JSON, `put("x.txt", "...")` text."""

    def write(name: str, content: Any = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.write_bytes(make_picture(len(name) + sum(map(ord, path.stem))))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def token_lines(*names: str) -> str:
    return "".join(
        f"{name}#{number}\tcaption {number} of {name} .\n" for name in names for number in range(5)
    )


@pytest.fixture
def flickr8k_root(put, tmp_path: Path) -> Path:
    for name in ("1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg"):
        put(f"Flicker8k_Dataset/{name}")
    # The published file has captions of a picture that does not exist, under an odd name.
    put(
        "Flickr8k.token.txt",
        token_lines("2_b.jpg", "1_a.jpg", "3_c.jpg", "4_d.jpg", "2258277193_586949ec62.jpg.1"),
    )
    put("Flickr_8k.trainImages.txt", "1_a.jpg\n2_b.jpg\n")
    put("Flickr_8k.devImages.txt", "3_c.jpg\n")
    put("Flickr_8k.testImages.txt", "4_d.jpg\n")
    return tmp_path


def test_flickr8k_gives_the_pictures_of_the_split_with_their_captions(flickr8k_root: Path) -> None:
    samples, faults = split_up(flickr8k(flickr8k_root))
    assert [sample.key for sample in samples] == ["1_a", "2_b"], "in the order of the split list"
    assert samples[0].captions == [f"caption {number} of 1_a.jpg ." for number in range(5)]
    assert samples[0].meta == {"name": "1_a.jpg"}
    assert samples[0].image == (flickr8k_root / "Flicker8k_Dataset" / "1_a.jpg").read_bytes()
    assert faults == []
    keys = {
        split: [s.key for s in split_up(flickr8k(flickr8k_root, split))[0]]
        for split in ("dev", "val", "test")
    }
    assert keys == {"dev": ["3_c"], "val": ["3_c"], "test": ["4_d"]}


@pytest.mark.parametrize(
    "folder", ["Flickr8k_Dataset", "flickr8k_dataset", "Images", "Flickr8k_Dataset/Flicker8k_Dataset"]
)
def test_flickr8k_folder_names(flickr8k_root: Path, folder: str) -> None:
    old = flickr8k_root / "Flicker8k_Dataset"
    aside = old.rename(flickr8k_root / "aside")
    (flickr8k_root / folder).parent.mkdir(exist_ok=True)
    aside.rename(flickr8k_root / folder)
    assert len(split_up(flickr8k(flickr8k_root))[0]) == 2


def test_flickr8k_text_files_may_lie_in_a_folder(flickr8k_root: Path) -> None:
    (flickr8k_root / "Flickr8k_text").mkdir()
    for path in flickr8k_root.glob("*.txt"):
        path.rename(flickr8k_root / "Flickr8k_text" / path.name)
    assert len(split_up(flickr8k(flickr8k_root))[0]) == 2


def test_flickr8k_names_bad_rows_by_file_and_line(flickr8k_root: Path, put) -> None:
    put(
        "Flickr8k.token.txt",
        "1_a.jpg#0\tgood\n1_a.jpg#1 no tab here\n\n1_a.jpg#2\t  \nother.jpg broken\n5_gone.jpg#0\tgone\n",
    )
    put("Flickr_8k.trainImages.txt", "1_a.jpg\n2_b.jpg\n\n5_gone.jpg\n")
    samples, faults = split_up(flickr8k(flickr8k_root))
    assert [(sample.key, sample.captions) for sample in samples] == [("1_a", ["good"])]
    assert [(fault.cause, fault.where) for fault in faults] == [
        ("bad_row", "Flickr8k.token.txt:2"),
        ("missing_caption", "Flickr8k.token.txt:4"),
        ("missing_caption", "Flickr_8k.trainImages.txt:2"),
        ("missing_image", "Flickr_8k.trainImages.txt:4"),
    ]
    assert "expected name.jpg#0<TAB>caption, got '1_a.jpg#1 no tab here'" in faults[0].why
    assert str(Path("Flicker8k_Dataset") / "5_gone.jpg") in faults[3].why


def test_flickr8k_errors(flickr8k_root: Path, put, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(
        ValueError, match=r"flickr8k has no split 'training': expected one of train, val, dev, test"
    ):
        flickr8k(flickr8k_root, "training")
    (flickr8k_root / "Flickr_8k.testImages.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no list of the test split in .*Flickr_8k.testImages.txt"):
        flickr8k(flickr8k_root, "test")
    (flickr8k_root / "Flickr8k.token.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no captions of flickr8k .*Flickr8k.token.txt or dataset_flickr8k"
    ):
        flickr8k(flickr8k_root)
    with pytest.raises(FileNotFoundError, match=r"no folder of pictures in .*Flickr8k_Dataset or"):
        flickr8k(tmp_path_factory.mktemp("empty"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: expected --root"):
        flickr8k(flickr8k_root / "nowhere")


def test_a_caption_file_that_is_not_text(flickr8k_root: Path) -> None:
    (flickr8k_root / "Flickr8k.token.txt").write_bytes(b"1_a.jpg#0\tcaf\xe9\n")
    with pytest.raises(ValueError, match=r"Flickr8k.token.txt: expected UTF-8 text"):
        flickr8k(flickr8k_root)


def karpathy(*images: tuple[str, str], **extra: Any) -> dict:
    return {
        "images": [
            {
                "filename": name,
                "split": split,
                "imgid": number,
                "sentences": [{"raw": f"raw {name}"}],
                **extra,
            }
            for number, (name, split) in enumerate(images)
        ]
    }


def test_karpathy_flickr(put, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        put(f"flickr30k_images/flickr30k_images/{name}")
    content = karpathy(("a.jpg", "train"), ("b.jpg", "val"), ("c.jpg", "test"), ("gone.jpg", "test"))
    content["images"].append({"filename": "x.jpg", "split": "test"})
    put("dataset_flickr30k.json", content)
    samples, faults = split_up(flickr30k(tmp_path, "test"))
    assert [(sample.key, sample.captions) for sample in samples] == [("c", ["raw c.jpg"])]
    assert samples[0].meta == {"name": "c.jpg"}, "imgid is no id of the set"
    assert [(fault.cause, fault.where) for fault in faults] == [
        ("bad_row", "dataset_flickr30k.json: images[4]"),
        ("missing_image", "dataset_flickr30k.json: images[3]"),
    ]
    assert [sample.key for sample in split_up(flickr30k(tmp_path, "dev"))[0]] == ["b"]
    assert {sample.key for sample in split_up(flickr30k(tmp_path, "all"))[0]} == {"a", "b", "c"}
    with pytest.raises(ValueError, match=r"dataset_flickr30k.json: no split 'trian': it has .*mean 'train'"):
        flickr30k(tmp_path, "trian")


def test_flickr8k_by_karpathy_when_there_is_nothing_else(put, tmp_path: Path) -> None:
    put("Images/a.jpg")
    put("dataset_flickr8k.json", karpathy(("a.jpg", "train")))
    assert [sample.key for sample in split_up(flickr8k(tmp_path))[0]] == ["a"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results_20130124.token", "a.jpg#0\tone\na.jpg#1\ttwo\nb.jpg#0\tthree\n"),
        (
            "results.csv",
            "image_name| comment_number| comment\na.jpg| 0| one\na.jpg| 1| two\nb.jpg| 0| three\n",
        ),
    ],
)
def test_flickr30k_caption_files(put, tmp_path: Path, name: str, content: str) -> None:
    put("flickr30k-images/a.jpg")
    put("flickr30k-images/b.jpg")
    put(name, content)
    samples, faults = split_up(flickr30k(tmp_path, "all"))
    assert [(sample.key, sample.captions) for sample in samples] == [("a", ["one", "two"]), ("b", ["three"])]
    assert faults == []
    with pytest.raises(
        FileNotFoundError, match=r"knows no splits: .*dataset_flickr30k.json or val.txt.*--split all"
    ):
        flickr30k(tmp_path, "dev")
    put("val.txt", "b\n")  # without .jpg, as Flickr30k Entities writes them
    assert [sample.key for sample in split_up(flickr30k(tmp_path, "dev"))[0]] == ["b"]


def test_the_broken_row_of_results_csv(put, tmp_path: Path) -> None:
    put("Images/2199200615.jpg")
    put(
        "results.csv",
        "image_name| comment_number| comment\n2199200615.jpg| 0| a dog\n2199200615.jpg| 4   A dog runs .\n",
    )
    samples, faults = split_up(flickr30k(tmp_path, "all"))
    assert samples[0].captions == ["a dog"]
    assert [(fault.cause, fault.where) for fault in faults] == [("bad_row", "results.csv:3")]


def coco_captions(*images: tuple[int, str, list[str]]) -> dict:
    return {
        "images": [{"id": number, "file_name": name} for number, name, _ in images],
        "annotations": [
            {"id": 10 * number + place, "image_id": number, "caption": caption}
            for number, _, captions in images
            for place, caption in enumerate(captions)
        ],
    }


def test_coco_official_files(put, tmp_path: Path) -> None:
    put("val2017/000000000139.jpg")
    put("val2017/000000000285.jpg")
    content = coco_captions(
        (285, "000000000285.jpg", ["a bear", " a big bear\n"]),
        (139, "000000000139.jpg", ["a room"]),
        (7, "000000000007.jpg", ["gone"]),
        (8, "000000000008.jpg", []),
    )
    content["annotations"] += [{"image_id": 99, "caption": "of nothing"}, {"image_id": 139}]
    content["images"] += [{"id": 9}]
    put("annotations/captions_val2017.json", content)
    for split in ("val", "val2017"):
        samples, faults = split_up(coco.samples(tmp_path, split))
        assert [(sample.key, sample.captions) for sample in samples] == [
            ("000000000285", ["a bear", "a big bear"]),
            ("000000000139", ["a room"]),
        ]
        assert samples[0].meta == {"name": "000000000285.jpg", "image_id": 285}
        assert [(fault.cause, fault.where) for fault in faults] == [
            ("bad_row", "captions_val2017.json: images[4]"),
            ("bad_row", "captions_val2017.json: annotations[4]"),
            ("bad_row", "captions_val2017.json: annotations[5]"),
            ("missing_image", "captions_val2017.json: images[2]"),
            ("missing_caption", "captions_val2017.json: images[3]"),
        ]


def test_coco_asks_for_the_year_when_both_are_there(put, tmp_path: Path) -> None:
    for year in ("2014", "2017"):
        put(f"train{year}/{year}.jpg")
        put(f"annotations/captions_train{year}.json", coco_captions((1, f"{year}.jpg", ["a"])))
    with pytest.raises(ValueError, match=r"say which with --split train2017 or train2014"):
        coco.samples(tmp_path, "train")
    assert [sample.key for sample in split_up(coco.samples(tmp_path, "train2014"))[0]] == ["2014"]


def test_coco_by_karpathy(put, tmp_path: Path) -> None:
    put("train2014/COCO_train2014_000000000009.jpg")
    put("images/val2014/COCO_val2014_000000000042.jpg")
    train = karpathy(("COCO_train2014_000000000009.jpg", "train"), filepath="train2014", cocoid=9)
    rest = karpathy(("COCO_val2014_000000000042.jpg", "restval"), filepath="val2014", cocoid=42)
    put("dataset_coco.json", {"images": train["images"] + rest["images"]})
    samples, _ = split_up(coco.samples(tmp_path, "train+restval"))
    assert [sample.meta["image_id"] for sample in samples] == [9, 42]
    assert len(split_up(coco.samples(tmp_path, "train"))[0]) == 1


def test_coco_errors(put, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"coco has no captions for the split 'test' .*dataset_coco.json"):
        coco.samples(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"no captions of the val split .*captions_val2017.json or"):
        coco.samples(tmp_path, "val")
    put("captions_val2017.json", coco_captions((1, "a.jpg", ["a"])))
    with pytest.raises(FileNotFoundError, match=r"no folder of pictures in .*expected val2017 with pictures"):
        coco.samples(tmp_path, "val")
    put("val2017/a.jpg")
    put("captions_val2017.json", '{"images": [{"id": 1, "file_na')
    with pytest.raises(ValueError, match=r"captions_val2017.json: not a JSON file.*cut short"):
        coco.samples(tmp_path, "val")
    put("captions_val2017.json", {"images": [], "info": {}})
    with pytest.raises(
        ValueError, match=r"list of objects under 'annotations', but the file has images, info"
    ):
        coco.samples(tmp_path, "val")
    put("captions_val2017.json", [1, 2])
    with pytest.raises(ValueError, match=r"list of objects under 'images', but the file has list"):
        coco.samples(tmp_path, "val")


def vqa_question(image_id: int, question_id: int) -> dict:
    return {"image_id": image_id, "question_id": question_id, "question": f"What is {question_id}?"}


def vqa_answers(image_id: int, question_id: int, answers: int = 10) -> dict:
    return {
        "image_id": image_id,
        "question_id": question_id,
        "question_type": "what is",
        "answer_type": "other",
        "multiple_choice_answer": "0",
        "answers": [
            {"answer": str(number // 4), "answer_confidence": "yes", "answer_id": number + 1}
            for number in range(answers)
        ],
    }


def test_vqav2_gathers_questions_and_ten_answers(put, tmp_path: Path) -> None:
    put("train2014/COCO_train2014_000000000071.jpg")
    put("train2014/COCO_train2014_000000000077.jpg")
    asked = [(77, 77000), (71, 71000), (77, 77001), (5, 5000), (71, 71009), (71, 71010)]
    put(
        "v2_OpenEnded_mscoco_train2014_questions.json",
        {"questions": [*[vqa_question(*ids) for ids in asked], {"question": "of what?"}]},
    )
    put(
        "v2_mscoco_train2014_annotations.json",
        {
            "annotations": [
                *[vqa_answers(*ids) for ids in asked[:4]],
                vqa_answers(71, 71009, 9),
                {"image_id": 1},
            ]
        },
    )
    samples, faults = split_up(vqav2.samples(tmp_path))
    assert [(sample.key, len(sample.meta["questions"])) for sample in samples] == [
        ("COCO_train2014_000000000077", 2),
        ("COCO_train2014_000000000071", 1),
    ]
    assert samples[0].meta["image_id"] == 77
    assert samples[0].meta["questions"][1] == {
        "question_id": 77001,
        "question": "What is 77001?",
        "answers": ["0", "0", "0", "0", "1", "1", "1", "1", "2", "2"],
        "answer_type": "other",
        "question_type": "what is",
    }
    assert samples[0].captions == []
    assert [(fault.cause, fault.where) for fault in faults] == [
        ("bad_row", "v2_mscoco_train2014_annotations.json: annotations[5]"),
        ("missing_answer", "v2_OpenEnded_mscoco_train2014_questions.json: questions[4]"),
        ("missing_answer", "v2_OpenEnded_mscoco_train2014_questions.json: questions[5]"),
        ("bad_row", "v2_OpenEnded_mscoco_train2014_questions.json: questions[6]"),
        ("missing_image", "v2_OpenEnded_mscoco_train2014_questions.json: questions[3]"),
    ]


@pytest.mark.parametrize(("split", "subset"), [("test", "test2015"), ("test-dev", "test-dev2015")])
def test_vqav2_test_questions_have_no_answers(put, tmp_path: Path, split: str, subset: str) -> None:
    put("test2015/COCO_test2015_000000000001.jpg")
    put(f"questions/v2_OpenEnded_mscoco_{subset}_questions.json", {"questions": [vqa_question(1, 1000)]})
    samples, faults = split_up(vqav2.samples(tmp_path, split))
    assert samples[0].meta["questions"] == [{"question_id": 1000, "question": "What is 1000?"}]
    assert faults == []


def test_vqav2_errors(put, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"vqav2 has no split 'dev': expected one of train, val, test, test-dev"
    ):
        vqav2.samples(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match=r"no val questions of VQA v2 in .*val2014_questions.json"):
        vqav2.samples(tmp_path, "val")
    put("val2014/COCO_val2014_000000000001.jpg")
    put("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [vqa_question(1, 1000)]})
    with pytest.raises(FileNotFoundError, match=r"no val answers of VQA v2 in .*val2014_annotations.json"):
        vqav2.samples(tmp_path, "val")


def test_easy_vqa_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"easy_vqa has no split 'val': expected one of train, test"):
        easy_vqa.samples("val")
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=r"the data set easy_vqa needs .* pip install 'pairstream\[data\]'"):
        easy_vqa.samples("train")


def test_easy_vqa_has_all_its_questions() -> None:
    pytest.importorskip("easy_vqa", reason="the extra `data` is not installed")
    counts = {}
    for split in ("train", "test"):
        samples, faults = split_up(easy_vqa.samples(split))
        asked = [question for sample in samples for question in sample.meta["questions"]]
        counts[split] = (len(samples), len(asked), len(faults))
        assert len({question["question_id"] for question in asked}) == len(asked)
        assert all(len(set(question["answers"])) == 1 for question in asked)
        assert all(len(question["answers"]) == 10 for question in asked)
    assert counts == {"train": (4000, 38575, 0), "test": (1000, 9673, 0)}
    first = samples[0]
    assert (first.key, first.extension, first.meta["image_id"]) == ("test-00000", "png", 0)


def test_folders_without_pictures_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "Images" / "readme.txt").write_text("pictures are elsewhere")
    with pytest.raises(FileNotFoundError, match="expected images with pictures in it"):
        need_folder(tmp_path, "images")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a b.jpg", "a_b"),
        ("x/y-1_z.PNG", "y-1_z"),
        ("ü.ü.jpg", "___"),
        ("2258277193.jpg.1", "2258277193_jpg"),
    ],
)
def test_keys_are_safe(name: str, key: str) -> None:
    assert safe_key(name) == key

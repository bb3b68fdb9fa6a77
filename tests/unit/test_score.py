"""`finetune score`: official files in, official numbers out, and each way of being wrong named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune import metrics, ptb
from finetune.cli import main
from finetune.score import score_answers, score_captions
from finetune.vqa_accuracy import question_accuracy
from pairstream.cli import run_stage

TRUTH = {
    1: ["A dog runs.", "the dog is running"],
    2: ["Two cats sleep", "a pair of cats"],
    3: ["Un café crème"],
}
GUESS = {1: "a dog is running", 2: "Two dogs sleep.", 3: "un café, crème!"}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), "utf-8")
    return path


def results(guess: dict) -> list[dict]:
    return [{"image_id": name, "caption": caption} for name, caption in guess.items()]


def annotations(truth: dict) -> dict:
    rows = [(name, caption) for name, row in truth.items() for caption in row]
    return {
        "images": [{"id": name} for name in truth],
        "annotations": [
            {"id": number, "image_id": name, "caption": text} for number, (name, text) in enumerate(rows)
        ],
    }


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "P.json", results(GUESS)), write(tmp_path / "R.json", annotations(TRUTH))


def run(*words: Any) -> int:
    return run_stage(main, ["score", *map(str, words)])


def test_captions_from_the_command(files, tmp_path, capsys):
    code = run(
        "--task", "caption", "--predictions", files[0], "--references", files[1], "--json", tmp_path / "F.json",
        "--no-java", "--resamples", 50,
    )  # fmt: skip
    assert code == 0
    result = json.loads((tmp_path / "F.json").read_text("utf-8"))
    assert json.loads(capsys.readouterr().out) == result
    expected = metrics.caption_metrics(list(GUESS.values()), list(TRUTH.values()))
    for n in range(1, 5):
        assert result[f"BLEU-{n}"] == pytest.approx(expected[f"bleu{n}"], abs=1e-12)
    assert result["ROUGE-L"] == pytest.approx(expected["rouge_l"], abs=1e-12)
    assert result["CIDEr"] == pytest.approx(expected["cider"], abs=1e-12)
    assert (result["images"], result["references"]) == (3, 5)
    assert (result["tokenizer"], result["df_source"]) == ("ptb", "references of this evaluation")
    assert result["intervals"]["ROUGE-L"][0] <= result["ROUGE-L"] <= result["intervals"]["ROUGE-L"][1]
    assert result["diversity"]["distinct_captions"] == 3
    assert "METEOR" not in result


def test_tokenized_texts_are_taken_as_they_are(tmp_path):
    guess, truth = {7: "A dog ."}, {7: ["a dog", "A dog ."]}
    p, r = write(tmp_path / "P.json", results(guess)), write(tmp_path / "R.json", annotations(truth))
    raw, given = (score_captions(p, r, tokenized=flag, java=False, resamples=0) for flag in (False, True))
    assert (raw["BLEU-1"], given["BLEU-1"]) == (pytest.approx(1.0), pytest.approx(1.0))
    truth = {7: ["a dog"]}
    r = write(tmp_path / "R.json", annotations(truth))
    raw, given = (score_captions(p, r, tokenized=flag, java=False, resamples=0) for flag in (False, True))
    assert raw["BLEU-1"] == pytest.approx(1.0)
    assert given["BLEU-1"] == pytest.approx(1 / 3)  # "A" and "." are words of their own there
    assert given["tokenizer"].startswith("none")


def test_a_subset_is_judged_only_on_demand(files, tmp_path):
    fewer = write(tmp_path / "P2.json", results({3: GUESS[3], 1: GUESS[1]}))
    with pytest.raises(ValueError, match=r"no prediction for 1 of 3 image_ids .*: 2\. --subset"):
        score_captions(fewer, files[1], java=False, resamples=0)
    result = score_captions(fewer, files[1], java=False, resamples=0, subset=True)
    expected = metrics.caption_metrics([GUESS[3], GUESS[1]], [TRUTH[3], TRUTH[1]])
    assert result["CIDEr"] == pytest.approx(expected["cider"], abs=1e-12)
    assert result["images"] == 2


def test_images_without_captions_need_no_prediction(files, tmp_path):
    content = annotations(TRUTH)
    content["images"].append({"id": 9})
    r = write(tmp_path / "R9.json", content)
    assert score_captions(files[0], r, java=False, resamples=0)["images"] == 3
    p = write(tmp_path / "P9.json", results({**GUESS, 9: "a cat"}))
    with pytest.raises(ValueError, match="image 9 has no caption to judge by"):
        score_captions(p, r, java=False, resamples=0)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (results({**GUESS, 8: "a cow"}), None, r"1 of 4 predictions are of a image_id .* does not have: 8"),
        (results({1: "a dog"}), None, r"no prediction for 2 of 3 image_ids .*: 2, 3"),
        ([*results(GUESS), {"image_id": 2, "caption": "again"}], None, "entry 3: image_id 2 a second time"),
        (results({**GUESS, 2: " "}), None, "entry 1: the caption of image_id 2 is empty.*--allow-empty"),
        (results({**GUESS, 2: None}), None, "entry 1: expected the text 'caption', got None"),
        ([{"caption": "a dog"}], None, "entry 0: expected image_id, a number or a text, got None"),
        ([["1", "a dog"]], None, "entry 0: expected an object"),
        ({"1": "a dog"}, None, "expected a list of .*, got dict"),
        ([], None, "no predictions in it"),
        ('[{"image_id": 1,\n "caption": "a dog"', None, "P.json: not valid JSON at line 2, column"),
        (None, "{", "R.json: not valid JSON at line 1"),
        (None, [], "expected COCO captions with the key 'annotations', found a list"),
        (None, {"images": []}, "with the key 'annotations', found images"),
        (None, annotations({**TRUTH, 2: [" "]}), "entry 2: the caption of image_id 2 is empty"),
        (None, {**annotations(TRUTH), "images": [{"id": 1}]}, "image_id 2 is not among the file's images"),
        (None, {**annotations(TRUTH), "images": [{"id": 1}, {"id": 1}]}, "of images: id 1 a second time"),
        (None, {"annotations": []}, "no captions in it"),
    ],
)
def test_bad_caption_files(files, tmp_path, capsys, predictions, references, message):
    p = files[0] if predictions is None else write(tmp_path / "P.json", predictions)
    r = files[1] if references is None else write(tmp_path / "R.json", references)
    with pytest.raises(ValueError, match=message):
        score_captions(p, r, java=False, resamples=0)
    assert run("--task", "caption", "--predictions", p, "--references", r, "--json", tmp_path / "F.json") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "F.json").exists()


def test_files_that_are_absent_or_no_text(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        score_captions(tmp_path / "nowhere.json", files[1])
    (tmp_path / "latin.json").write_bytes('[{"image_id": 1, "caption": "café"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json: not UTF-8"):
        score_captions(tmp_path / "latin.json", files[1])
    for content, message in (
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1}\n{"a": 2}\n', "as `predict` writes"),
    ):
        with pytest.raises(ValueError, match=rf"Q\.json: .*{message}"):
            score_captions(write(tmp_path / "Q.json", content), files[1])
    with pytest.raises(ValueError, match="is a folder: expected a \\.json file"):
        score_captions(tmp_path, files[1])
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + files[0].read_bytes())
    assert score_captions(tmp_path / "bom.json", files[1], java=False, resamples=0)["images"] == 3


def test_an_empty_caption_scores_nothing_when_it_is_allowed(files, tmp_path):
    p = write(tmp_path / "P.json", results({**GUESS, 2: ""}))
    result = score_captions(p, files[1], java=False, resamples=0, allow_empty=True)
    assert result["empty_captions"] == 1
    whole = metrics.cider([ptb.tokenize(text) for text in ("a dog is running", "", "un café, crème!")],
                          [[ptb.tokenize(text) for text in row] for row in TRUTH.values()])  # fmt: skip
    assert result["CIDEr"] == pytest.approx(whole[0])
    assert whole[1][1] == 0


def test_two_models_are_compared_on_the_same_images(files, tmp_path):
    worse = write(tmp_path / "W.json", results(dict.fromkeys(GUESS, "a train")))
    result = score_captions(files[0], files[1], java=False, compare=worse, resamples=40)
    test = result["compared"]["tests"]["CIDEr"]
    assert test["difference"] == pytest.approx(result["CIDEr"] - result["compared"]["numbers"]["CIDEr"])
    assert test["difference"] > 0
    fewer = write(tmp_path / "W.json", results({1: "a train"}))
    with pytest.raises(ValueError, match=r"W\.json: no prediction for 2 of 3"):
        score_captions(files[0], files[1], java=False, compare=fewer)


def test_chair_from_a_file_of_objects(files, tmp_path):
    content = {
        "synonyms": {"dog": "dog", "puppy": "dog", "cat": "cat"},
        "images": {"1": ["puppy"], "2": ["cat"]},
    }
    with pytest.raises(ValueError, match="no objects of image 3"):
        score_captions(
            files[0], files[1], java=False, resamples=0, objects=write(tmp_path / "o.json", content)
        )
    content["images"]["3"] = []
    objects = write(tmp_path / "o.json", content)
    result = score_captions(files[0], files[1], java=False, resamples=0, objects=objects)["CHAIR"]
    assert (result["chair_i"], result["hallucinated"]) == (0.5, {"dog": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"synonyms": {"dog": 3}, "images": {}}, "'synonyms' to be an object of texts"),
        ({"synonyms": "dog", "images": {}}, "'synonyms' to be an object of texts"),
        ({"synonyms": {"dog": "dog"}, "images": [["dog"]]}, "'images' to be an object"),
        ({"synonyms": {"dog": "dog"}, "images": {"1": "dog"}}, "a list of objects for image 1, got 'dog'"),
        ({"synonyms": {"dog": "dog"}, "images": {"1": [2]}}, "a list of objects for image 1"),
        ({"synonyms": {"dog": "dog"}, "images": {"1": []}}, "no objects of image 2"),
    ],
)
def test_bad_files_of_objects(files, tmp_path, content, message):
    objects = write(tmp_path / "objects.json", content)
    with pytest.raises(ValueError, match=rf"objects\.json: .*{message}"):
        score_captions(files[0], files[1], objects=objects, java=False, resamples=0)


def test_faults_in_options_are_told_before_any_work(files, tmp_path, capsys):
    words = ["--task", "caption", "--predictions", files[0], "--references", files[1]]
    assert run(*words, "--resamples", "-1") == 2
    assert "--resamples -1: expected 0 or more" in capsys.readouterr().err
    assert run(*words, "--json", tmp_path) == 2
    shown = capsys.readouterr()
    assert "is a folder: expected a file, such as" in shown.err
    assert not shown.out
    assert run(*words, "--json", f"{files[0]}/scores.json") == 2
    shown = capsys.readouterr()
    assert "scores.json: no file can be written in" in shown.err
    assert not shown.out


def test_the_command_says_why_a_java_metric_is_absent(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        run("--task", "caption", "--predictions", files[0], "--references", files[1], "--resamples", "0") == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["unavailable"] == dict.fromkeys(("METEOR", "SPICE"), "no Java runtime (`java`) on the path")
    assert not {"METEOR", "SPICE"} & set(result)


def vqa(rows: list[tuple]) -> tuple[dict, dict, list[dict]]:
    """Annotations, questions and results of `(answers, prediction, answer_type, image)` rows."""
    found = [
        {
            "question_id": number,
            "image_id": image,
            "answer_type": kind,
            "question_type": "what is",
            "answers": [{"answer": answer, "answer_id": place} for place, answer in enumerate(answers, 1)],
        }
        for number, (answers, _, kind, image) in enumerate(rows)
    ]
    asked = [
        {"question_id": number, "image_id": row[3], "question": "what?"} for number, row in enumerate(rows)
    ]
    given = [{"question_id": number, "answer": row[1]} for number, row in enumerate(rows)]
    return {"annotations": found}, {"questions": asked}, given


ROWS = [
    (["two"] * 10, "2", "number", 1),  # the official script normalises nothing here
    (["yes"] * 8 + ["no"] * 2, "Yes.", "yes/no", 1),
    (["red"] * 2 + [f"other{place}" for place in range(8)], "red", "other", 2),
]


@pytest.fixture
def vqa_files(tmp_path: Path) -> tuple[Path, Path, Path]:
    truth, asked, given = vqa(ROWS)
    return (
        write(tmp_path / "results.json", given),
        write(tmp_path / "annotations.json", truth),
        write(tmp_path / "questions.json", asked),
    )


def test_answers_from_the_command(vqa_files, tmp_path):
    p, r, q = vqa_files
    words = ["--task", "vqa", "--predictions", p, "--references", r, "--questions", q, "--json"]
    assert run(*words, tmp_path / "F.json", "--resamples", 20) == 0
    result = json.loads((tmp_path / "F.json").read_text())
    each = [question_accuracy(guess, answers, "official") for answers, guess, _, _ in ROWS]
    assert each == pytest.approx([0, 1, 0.6])
    assert result["accuracy"] == 100 * sum(each) / 3
    assert result["by_answer_type"] == {"number": 0, "other": pytest.approx(60), "yes/no": 100}
    assert result["by_question_type"] == {"what is": result["accuracy"]}
    assert (result["unit"], result["mode"]) == ("percent", "official")
    assert (result["questions"], result["images"]) == (3, 2)
    assert result["accuracy_by_mode"]["fixed"] == pytest.approx(100 * 2.6 / 3)
    assert run(*words, tmp_path / "F.json", "--mode", "fixed", "--resamples", 0) == 0
    result = json.loads((tmp_path / "F.json").read_text())
    assert result["accuracy"] == pytest.approx(100 * 2.6 / 3)
    assert "intervals" not in result


def test_answers_without_an_answer_id(tmp_path):
    truth, _, given = vqa(ROWS)
    for row in truth["annotations"]:
        for answer in row["answers"]:
            del answer["answer_id"]
    p, r = write(tmp_path / "p.json", given), write(tmp_path / "r.json", truth)
    assert score_answers(p, r, mode="fixed", resamples=0)["accuracy"] == pytest.approx(100 * 2.6 / 3)
    assert score_answers(p, r, mode="official", resamples=0)["accuracy"] < 40  # equal records vanish together


def test_bad_answer_files(vqa_files, tmp_path):
    p, r, q = vqa_files
    truth, asked, given = vqa(ROWS)

    def bad(
        message: str, *, results: Any = given, truth: Any = truth, asked: Any = None, **options: Any
    ) -> None:
        files = write(tmp_path / "p.json", results), write(tmp_path / "r.json", truth)
        questions = None if asked is None else write(tmp_path / "q.json", asked)
        with pytest.raises(ValueError, match=message):
            score_answers(*files, questions=questions, resamples=0, **options)

    bad(
        "1 of 4 predictions are of a question_id .* does not have: 77",
        results=[*given, {**given[0], "question_id": 77}],
    )
    bad("no prediction for 1 of 3 question_ids", results=given[:2])
    bad("entry 3: question_id 0 a second time", results=[*given, given[0]])
    bad("the answer of question_id 0 is empty", results=[{**given[0], "answer": ""}, *given[1:]])
    bad("expected the text 'answer', got 2", results=[{**given[0], "answer": 2}, *given[1:]])
    rows = truth["annotations"]
    bad("entry 3: question_id 0 a second time", truth={"annotations": [*rows, rows[0]]})
    bad("question_id 0 has no answers", truth={"annotations": [{**rows[0], "answers": []}, *rows[1:]]})
    bad("expected answers like", truth={"annotations": [{**rows[0], "answers": ["yes"]}, *rows[1:]]})
    bad("no annotations in it", truth={"annotations": []})
    questions = asked["questions"]
    bad("does not have: 2", asked={"questions": questions[:2]})
    bad("q.json: entry 3: question_id 0 a second time", asked={"questions": [*questions, questions[0]]})
    bad(
        "the question of question_id 0 is empty",
        asked={"questions": [{**questions[0], "question": " "}, *questions[1:]]},
    )
    assert score_answers(p, r, questions=q, resamples=0)["questions"] == 3


def test_options_of_the_other_task_are_refused(files, tmp_path, capsys):
    words = ["--predictions", files[0], "--references", files[1]]
    assert run("--task", "caption", *words, "--questions", files[1]) == 2
    assert "--questions belongs to the other task" in capsys.readouterr().err
    assert run("--task", "vqa", *words, "--tokenized") == 2
    assert "--tokenized belongs to the other task" in capsys.readouterr().err


def test_the_help_names_the_further_commands(capsys):
    assert run_stage(main, ["--help"]) == 0
    assert "pairstream finetune score" in capsys.readouterr().out

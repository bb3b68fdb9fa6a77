"""`pairstream finetune score`: judge a results file alone, whoever wrote it."""

from __future__ import annotations

import json as json_module
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune import metrics, ptb
from finetune.diversity import chair, diversity
from finetune.intervals import Statistic, bootstrap_interval, mean_of, paired_test, per_image
from finetune.java_metrics import java_metrics
from finetune.ngrams import read_corpus
from finetune.result_files import (
    match,
    member,
    read_answers,
    read_captions,
    read_json,
    read_predictions,
    read_questions,
)
from finetune.vqa_accuracy import Mode, question_accuracy
from pairstream.atomic import check_file_place, write_text
from pairstream.run import finite

GIVEN = "none: the texts were given as PTB tokens"
# What resampling needs of each caption metric: sums over images, and the way from them to the number.
Resampled = dict[str, tuple[np.ndarray, Statistic]]


def score(
    *,
    task: Literal["caption", "vqa"],
    predictions: Path,
    references: Path,
    json: Path | None = None,
    questions: Path | None = None,
    tokenized: bool = False,
    mode: Mode = "official",
    subset: bool = False,
    allow_empty: bool = False,
    compare: Path | None = None,
    objects: Path | None = None,
    java: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> None:
    """Judge a results file by the data set's own annotations.

    Args:
        task: caption for COCO captions, vqa for VQAv2.
        predictions: A results file in the official format: a list of image_id and caption, or question_id and answer.
        references: The official annotation file.
        json: Also write the numbers to this file.
        questions: vqa: the official question file; its ids must be those of the annotations.
        tokenized: caption: all texts are PTB tokens already, joined by spaces, and are taken as they are.
        mode: vqa: official as the published script counts, fixed without its two faults; both are reported.
        subset: Judge only what was predicted, instead of refusing a file that lacks predictions.
        allow_empty: Take predictions without a character as they are, instead of refusing them.
        compare: Another model's results file on the same data, for a paired test.
        objects: caption: JSON with synonyms (word to object) and images (id to objects), for CHAIR.
        java: caption: also METEOR and SPICE where Java, pycocoevalcap and their files are there.
        resamples: Of the bootstrap intervals; 0 leaves them out.
        seed: Of the resampling.
    """
    check_options(task, questions=questions, tokenized=tokenized, objects=objects)
    if resamples < 0:
        raise ValueError(f"--resamples {resamples}: expected 0 or more")
    if json is not None and json.is_dir():
        raise ValueError(f"--json {json} is a folder: expected a file, such as {json / 'scores.json'}")
    if json is not None:
        check_file_place(json, "--json")
    if task == "caption":
        result = score_captions(
            predictions,
            references,
            tokenized=tokenized,
            subset=subset,
            allow_empty=allow_empty,
            compare=compare,
            objects=objects,
            java=java,
            resamples=resamples,
            seed=seed,
        )
    else:
        result = score_answers(
            predictions,
            references,
            questions=questions,
            mode=mode,
            subset=subset,
            allow_empty=allow_empty,
            compare=compare,
            resamples=resamples,
            seed=seed,
        )
    content = json_module.dumps(finite(result), indent=2, ensure_ascii=False)
    print(content)
    if json is not None:
        write_text(json, content + "\n")


def check_options(task: str, *, questions: Path | None, tokenized: bool, objects: Path | None) -> None:
    """Refuse options of the other task, which would otherwise be overlooked."""
    given = {"--questions": questions is not None, "--tokenized": tokenized, "--objects": objects is not None}
    allowed = {"--questions"} if task == "vqa" else {"--tokenized", "--objects"}
    for name, there in given.items():
        if there and name not in allowed:
            raise ValueError(f"{name} belongs to the other task: --task is {task}")


def score_captions(
    predictions: Path,
    references: Path,
    *,
    tokenized: bool = False,
    subset: bool = False,
    allow_empty: bool = False,
    compare: Path | None = None,
    objects: Path | None = None,
    java: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of a COCO results file; see `score`.

    Returns:
        `BLEU-1` ... `BLEU-4`, `ROUGE-L`, `CIDEr` (CIDEr-D, as coco-caption scales it: human captions have around 1),
        `METEOR` and `SPICE` where they could be had (else the reason in `unavailable`), `intervals` (95 %, by metric;
        CIDEr's with the document frequencies held fixed), `diversity`, and what the numbers depend on: `images`,
        `references`, `tokenizer`, `df_source`.

    Raises:
        FileNotFoundError: A file is absent.
        ValueError: A file is broken, or ids do not match; see `result_files`.
    """
    truth = read_captions(references)
    written = read_predictions(predictions, "image_id", "caption", allow_empty=allow_empty)
    judged = {name: row for name, row in truth.items() if row or name in written}
    names = match(written, judged, "image_id", (predictions, references), subset=subset)
    for name in names:
        if not truth[name]:
            raise ValueError(f"{references}: image {name} has no caption to judge by")
    tokens = (lambda text: text) if tokenized else ptb.tokenize
    expected = [[tokens(caption) for caption in truth[name]] for name in names]
    candidates = [tokens(written[name]) for name in names]
    sums = resampled(candidates, expected)
    result: dict[str, Any] = {"task": "caption"}
    result |= {name: statistic(rows.sum(axis=0)) for name, (rows, statistic) in sums.items()}
    result["CIDEr"] = metrics.cider(candidates, expected)[0]
    if java:
        found, result["unavailable"] = java_metrics(candidates, expected)
        result |= found
    if resamples:
        result["intervals"] = intervals(sums, resamples, seed)
        result["interval_level"] = 0.95
    result |= {
        "images": len(names),
        "references": sum(map(len, expected)),
        "empty_captions": sum(not text.split() for text in candidates),
        "tokenizer": GIVEN if tokenized else ptb.NAME,
        "df_source": metrics.OWN_REFERENCES,
        "diversity": diversity(candidates),
    }
    if objects is not None:
        result["CHAIR"] = chair_of(objects, names, candidates)
    if compare is not None:
        others = read_predictions(compare, "image_id", "caption", allow_empty=allow_empty)
        same_ids(others, written, "image_id", compare, predictions)
        other = resampled([tokens(others[name]) for name in names], expected)
        result["compared"] = compared(compare, sums, other, resamples, seed)
    return result


def resampled(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Resampled:
    """All metrics as sums over images."""
    metrics.check_rows(candidates, references)
    corpus = read_corpus(candidates, references)
    counts = metrics.bleu_sums(corpus).astype(np.float64)

    def bleu(n: int) -> Statistic:
        return lambda sums: metrics.bleu_of(sums)[n - 1]

    found: Resampled = {f"BLEU-{n}": (counts, bleu(n)) for n in range(1, 5)}
    found["ROUGE-L"] = (per_image(metrics.rouge_l_each(candidates, references)), mean_of)
    found["CIDEr"] = (per_image(metrics.cider_each(corpus).tolist()), mean_of)
    return found


def chair_of(path: Path, names: Sequence[str], candidates: Sequence[str]) -> dict[str, Any]:
    """CHAIR by a file of objects."""
    content = read_json(path)
    synonyms = member(path, content, "synonyms", "objects for CHAIR")
    named = synonyms.values() if isinstance(synonyms, dict) else synonyms
    if not isinstance(synonyms, dict | list) or not all(isinstance(name, str) for name in named):
        raise ValueError(
            f"{path}: expected 'synonyms' to be an object of texts, word to object, got {repr(synonyms)[:80]}"
        )
    listed = member(path, content, "images", "objects for CHAIR")
    if not isinstance(listed, dict):
        raise ValueError(
            f"{path}: expected 'images' to be an object, id to its objects, got {repr(listed)[:80]}"
        )
    images = {str(name): row for name, row in listed.items()}
    for name, row in images.items():
        if not isinstance(row, list) or not all(isinstance(entry, str) for entry in row):
            raise ValueError(f"{path}: expected a list of objects for image {name}, got {repr(row)[:80]}")
    absent = [name for name in names if name not in images]
    if absent:
        raise ValueError(f"{path}: no objects of image {absent[0]} (an empty list says that there are none)")
    return chair(candidates, [images[name] for name in names], synonyms)


def score_answers(
    predictions: Path,
    references: Path,
    *,
    questions: Path | None = None,
    mode: Mode = "official",
    subset: bool = False,
    allow_empty: bool = False,
    compare: Path | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of a VQA results file; see `score`.

    Returns:
        `accuracy`, `by_answer_type` and `by_question_type` in percent, as the official script says them, but not
        rounded to two places as there; `unit`, `mode`, `accuracy_by_mode` (both modes), `questions`, `images`,
        `questions_by_answer_type`, and the 95 % interval of the accuracy over resampled images.

    Raises:
        FileNotFoundError: A file is absent.
        ValueError: A file is broken, or ids do not match; see `result_files`.
    """
    truth = read_answers(references)
    written = read_predictions(predictions, "question_id", "answer", allow_empty=allow_empty)
    if questions is not None:
        asked = read_questions(questions)
        match(truth, asked, "question_id", (references, questions), subset=True)
        match(written, asked, "question_id", (predictions, questions), subset=True)
    names = match(written, truth, "question_id", (predictions, references), subset=subset)
    modes: tuple[Mode, Mode] = ("official", "fixed")
    scores = {
        each: [question_accuracy(written[name], truth[name].answers, each) for name in names]
        for each in modes
    }
    ours = scores[mode]
    images = [truth[name].image for name in names]
    result: dict[str, Any] = {"task": "vqa", "accuracy": percent(ours), "unit": "percent", "mode": mode}
    for kind in ("answer_type", "question_type"):
        labels = [truth[name].kinds.get(kind, "(none)") for name in names]
        groups: dict[str, list[float]] = {}
        for label, value in zip(labels, ours, strict=True):
            groups.setdefault(label, []).append(value)
        result[f"by_{kind}"] = {label: percent(group) for label, group in sorted(groups.items())}
        result[f"questions_by_{kind}"] = dict(sorted(Counter(labels).items()))
    result |= {
        "accuracy_by_mode": {each: percent(values) for each, values in scores.items()},
        "questions": len(names),
        "images": len(set(images)),
        "empty_answers": sum(not written[name].strip() for name in names),
    }
    sums = {"accuracy": (per_image([100 * value for value in ours], images), mean_of)}
    if resamples:
        result["intervals"] = intervals(sums, resamples, seed)
        result["interval_level"] = 0.95
    if compare is not None:
        others = read_predictions(compare, "question_id", "answer", allow_empty=allow_empty)
        same_ids(others, written, "question_id", compare, predictions)
        other = [question_accuracy(others[name], truth[name].answers, mode) for name in names]
        theirs = {"accuracy": (per_image([100 * value for value in other], images), mean_of)}
        result["compared"] = compared(compare, sums, theirs, resamples, seed)
    return result


def percent(values: Sequence[float]) -> float:
    """The mean in percent, in the official script's order of operations."""
    return 100 * float(sum(values)) / len(values)


def intervals(sums: Mapping[str, tuple[np.ndarray, Statistic]], resamples: int, seed: int) -> dict[str, Any]:
    """Lower and upper end for each metric."""
    return {
        name: list(bootstrap_interval(rows, statistic, resamples=resamples, seed=seed))
        for name, (rows, statistic) in sums.items()
    }


def same_ids(
    others: Mapping[str, str], written: Mapping[str, str], key: str, compare: Path, predictions: Path
) -> None:
    """A paired test is of the same images: refuse anything else."""
    match(others, written, key, (compare, predictions), subset=False)


def compared(
    path: Path,
    ours: Mapping[str, tuple[np.ndarray, Statistic]],
    theirs: Mapping[str, tuple[np.ndarray, Statistic]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The other model's numbers, and whether the difference (ours minus theirs) is more than chance."""
    tests = {
        name: paired_test(rows, theirs[name][0], statistic, resamples=resamples or 1000, seed=seed)
        for name, (rows, statistic) in ours.items()
    }
    numbers = {name: statistic(rows.sum(axis=0)) for name, (rows, statistic) in theirs.items()}
    return {"predictions": str(path), "numbers": numbers, "tests": tests}

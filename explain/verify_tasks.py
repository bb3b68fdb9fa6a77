"""`pairstream explain verify` for captioners, VQA models and classifiers: do their heatmaps hang on what is asked?

Neighbouring trials are two questions about one picture: the words for each of its two kinds in the model's own caption;
a question about each kind, where the model answers both rightly; the two likeliest labels of a post. The gates are
those that need no truth about the picture and no unit of the score: maps of the two differ, and maps of random weights
are others. What scenes know of their objects stands beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.scenes.language import article, plural
from data.scenes.questions import CATEGORY_QUESTIONS
from data.scenes.vocabulary import COLOUR_SYNONYMS, alike, kinds
from data.transforms import decode_image
from explain.targets import Target
from explain.tasks import LabelTarget, TextTarget, answer_target, load, text_pieces
from explain.trials import Raw, Trials, as_trials, read_trial, scene_samples, shard_samples
from explain.verify import GATES, check_wishes, hold
from pretrain.encoder import Encoder

Samples = Iterable[tuple[bytes, dict[str, Any]]]
TASK_GATES = tuple(gate for gate in GATES if gate.number in ("two_text_spearman", "random_weights_spearman"))
WITH_OBJECTS = ("target_over_distractor", "pointing", "energy_in_box")
BATCH = 16  # pictures that a model writes about at a time


class Question(NamedTuple):
    """A picture with two scores that should not have the same map."""

    raw: Raw
    targets: tuple[Target, Target]


class TasksAsked:
    """Trials that each have a target of their own."""

    batch = 1

    def __init__(self, encoder: Encoder, trials: Trials, targets: Sequence[Target]):
        self.encoder, self.trials, self.targets = encoder, trials, targets

    def target(self, encoder: Encoder, part: Tensor) -> Target:
        changed = copy.copy(self.targets[int(part)])
        changed.encoder = encoder
        return changed


def verify_task(
    model: str | Path | Any,
    kind: str,
    *,
    data: str | Sequence[str] | None = None,
    pictures: int = 40,
    method: str = "auto",
    methods: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    show: bool = False,
) -> dict[str, Any]:
    """Hold the heatmaps of a task model against each other, and against those of random weights.

    Args:
        model: The model, or its folder.
        kind: `caption`, `vqa` or `classify`.
        data: Shards whose JSON has `objects` with masks (for a classifier: `text`); fresh scenes when None.
        pictures: So many, with two questions each.
        method: The one that is judged; `auto` is the tower's default.
        methods: Others beside it.
        seed: Of fresh scenes and random weights.
        device: For a folder.
        show: Print progress.

    Returns:
        As `explain.verify.verify_encoder`; scores are log-probabilities, or a label's logit. A classifier's numbers
        of objects are None.

    Raises:
        ValueError: No picture that the model could be asked about, or a model for another task.
        FileNotFoundError: No task model is there.
    """
    check_wishes(pictures, method, methods)
    opened: Any = load(model, device, kind)
    opened.eval()
    encoder: Encoder = opened.encoder
    samples = (
        scene_samples(20 * pictures, max(encoder.image_size), seed) if data is None else shard_samples(data)
    )
    makers = {"caption": caption_questions, "vqa": vqa_questions, "classify": label_questions}
    counts = [0, 0]
    found = list(islice(makers[kind](opened, samples, counts), pictures))
    if not found:
        raise ValueError(
            f"no picture to ask about: {counts[0]} were looked at, and the model "
            + {
                "caption": "names both kinds of objects of none in its caption",
                "vqa": "answers rightly about both kinds of objects of none",
                "classify": "needs a text with them, which none has",
            }[kind]
        )
    trials = as_trials([one.raw for one in found], tried=counts[0], unknown=counts[1])
    asked = TasksAsked(encoder, trials, [each for one in found for each in one.targets])
    result = hold(
        asked, TASK_GATES, method=method, methods=methods, slow=(), seed=seed, show=show, complete=16
    )
    if kind == "classify":
        result["box_area"] = None
        for numbers in result["methods"].values():
            numbers |= dict.fromkeys(WITH_OBJECTS)
    name = str(getattr(model, "name", model)) if isinstance(model, str | Path) else type(opened).__name__
    unit = "logit" if hasattr(opened, "labels") else "log-prob."
    return {"model": name, "data": "scenes (val)" if data is None else data, "score": unit, **result}


def batches(model: Any, samples: Samples) -> Iterator[list[Raw]]:
    """Pictures of exactly two kinds, some at a time."""
    kept: list[Raw] = []
    for image, record in samples:
        raw = read_trial(model.encoder, image, record)
        if raw is not None:
            kept.append(raw)
        if len(kept) == BATCH:
            yield kept
            kept = []
    if kept:
        yield kept


def caption_questions(model: Any, samples: Samples, counts: list[int]) -> Iterator[Question]:
    """The words for each kind in the model's own caption; `counts` grows by pictures seen and left out."""
    prompt = model.caption_task.prompt
    before = model.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    for raws in batches(model, samples):
        for raw, caption in zip(raws, model.caption([raw.image for raw in raws]), strict=True):
            counts[0] += 1
            spans: list[tuple[int, int] | None] = [None]
            ids: list[int] = []
            if caption.strip():
                ids, words, places = text_pieces(model.tokenizer, caption, behind_prompt=bool(prompt))
                spans = [named(words, places, name) for name in raw.names]
            if None in spans:
                counts[1] += 1
                continue
            one, other = (TextTarget(model, before, ids, span) for span in spans if span is not None)
            yield Question(raw, (one, other))


def named(words: Sequence[str], places: Sequence[tuple[int, int]], name: str) -> tuple[int, int] | None:
    """The span of token ids of the words for a kind, in either number; None where there are none."""
    known = kinds().get(name)
    names = known.names if known else (name,)
    plain = [word.lower().strip(".,;!?") for word in words]
    for form in [each for one in names for each in (one, plural(one))]:
        parts = form.split()
        for start in range(len(plain) - len(parts) + 1):
            if plain[start : start + len(parts)] == parts:
                return places[start][0], places[start + len(parts) - 1][1]
    return None


def vqa_questions(model: Any, samples: Samples, counts: list[int]) -> Iterator[Question]:
    """A question about each of the two kinds, where the model answers both rightly.

    What it answers wrongly, or would answer to anything, cannot be held against the picture.
    """
    for raws in batches(model, samples):
        asked = [question_about(raw, place) for raw in raws for place in (0, 1)]
        denied = [f"is there {article(absent(raw))} in the picture?" for raw in raws]
        images = [raw.image for raw in raws for _ in raw.names]
        answers = model.answer(
            [*images, *(raw.image for raw in raws)], [*(question for question, _ in asked), *denied]
        )
        said = [answer.strip().lower() for answer in answers]
        for number, raw in enumerate(raws):
            counts[0] += 1
            both = range(2 * number, 2 * number + 2)
            guessed = said[len(asked) + number] == "yes"  # of what is not there
            if any(said[each] not in asked[each][1] or (said[each] == "yes" and guessed) for each in both):
                counts[1] += 1
                continue
            one, other = (answer_target(model, asked[each][0], said[each]) for each in both)
            yield Question(raw, (one, other))


def question_about(raw: Raw, place: int) -> tuple[str, tuple[str, ...]]:
    """A question that only the objects of one kind answer, and what is right.

    What it is, where only one of the kinds is of its category; its colour, where it may have several; whether it is
    there, otherwise.
    """
    name, other = raw.names[place], raw.names[1 - place]
    kind, rival = kinds().get(name), kinds().get(other)
    if kind and rival:
        category, beside = kind.category, rival.category
        eaten = {category, beside} <= {"food", "fruit"}
        if category in CATEGORY_QUESTIONS and category not in ("face", beside) and not eaten:
            names = kind.names
            return f"{CATEGORY_QUESTIONS[category][0]}?", (*names, *(plural(each) for each in names))
        if kind.colourful and raw.colours[place]:
            colour, several = raw.colours[place], raw.counts[place] > 1
            words = f"are the {plural(name)}" if several else f"is the {name}"
            return f"what color {words}?", (colour, *COLOUR_SYNONYMS.get(colour, ()))
    return f"is there {article(name)} in the picture?", ("yes",)


def absent(raw: Raw) -> str:
    """A kind that a picture does not show; another one for most pictures."""
    names = [name for name in kinds() if not any(alike(name, one) for one in raw.names if one in kinds())]
    return names[int(raw.image.long().sum()) % len(names)]


def label_questions(model: Any, samples: Samples, counts: list[int]) -> Iterator[Question]:
    """The two likeliest labels of each picture with a text."""
    for image, record in samples:
        text = record.get("text")
        if not text:
            continue
        counts[0] += 1
        pixels = model.encoder.preprocess(decode_image(image))
        shares = model.classify([pixels], [text])[0]
        labels = sorted(shares, key=lambda name: -shares[name])[:2]
        nothing = torch.zeros(2, *model.encoder.image_size, dtype=torch.bool)
        raw = Raw(pixels, (labels[0], labels[1]), (labels[0], labels[1]), nothing, nothing)
        one, other = (LabelTarget(model, [text], model.labels.index(label)) for label in labels)
        yield Question(raw, (one, other))

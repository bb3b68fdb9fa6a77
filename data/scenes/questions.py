"""Questions about a scene with ten answers each, balanced so that guessing without looking does not pay."""

from __future__ import annotations

import random
import re
from typing import Any

from data.scenes.compose import SPLITS, Group, Scene
from data.scenes.language import NUMBERS, article, plural, spot
from data.scenes.vocabulary import BACKGROUND_COLOURS, BACKGROUNDS, COLOUR_SYNONYMS, alike

PER_PICTURE = 7
# how readily a count is asked for: single objects are far more common than four of a kind
ASK_COUNT = {1: 0.22, 2: 0.8, 3: 0.85, 4: 1.0}
CATEGORY_QUESTIONS = {
    "animal": ("what animal is in the picture", "which animal is this", "what kind of animal can you see"),
    "fruit": ("what fruit is in the picture", "which fruit is this", "what kind of fruit is shown"),
    "food": ("what food is in the picture", "what can you eat here", "what kind of food is shown"),
    "vehicle": (
        "what vehicle is in the picture",
        "what kind of vehicle is this",
        "which vehicle can you see",
    ),
    "plant": ("what plant is in the picture", "what kind of plant is this"),
    "clothing": ("what can you wear here", "what piece of clothing is in the picture"),
    "shape": ("what shape is in the picture", "which shape can you see"),
    "face": ("how does the face feel", "what mood is the face in"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SAID = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def the(group: Group) -> str:
    """`the cow`, `the cows`."""
    return f"the {group.kind.name if group.count == 1 else plural(group.kind.name)}"


def be(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def answer_name(group: Group) -> tuple[str, tuple[str, ...]]:
    """How people name a group in an answer, and what some of them say instead."""
    several = (plural(group.kind.name),) if group.count > 1 else ()
    return group.kind.name, (*several, *group.kind.synonyms)


def ten(answer: str, others: tuple[str, ...], rng: random.Random) -> list[str]:
    """Ten people's answers: at least seven agree, in four questions of ten somebody says it otherwise."""
    strays = rng.randint(1, 3) if others and rng.random() < 0.4 else 0
    answers = [answer] * (10 - strays) + [rng.choice(others) for _ in range(strays)]
    rng.shuffle(answers)
    return answers


Asked = tuple[
    str, str, tuple[str, ...], str, str
]  # question, answer, what others say, answer type, question type


def open_questions(scene: Scene, rng: random.Random) -> list[Asked]:
    """Questions whose answer is a word or a number."""
    groups = scene.groups
    asked: list[Asked] = []
    for category, forms in CATEGORY_QUESTIONS.items():
        found = [group for group in groups if group.kind.category == category]
        rival = category == "food" and any(group.kind.category == "fruit" for group in groups)
        if len(found) == 1 and not rival:  # fruit is food, too
            group = found[0]
            name, others = (group.kind.mood, ()) if category == "face" else answer_name(group)
            text = rng.choice(forms)
            if category == "face" and group.count > 1:
                text = rng.choice(("how do the faces feel", "what mood are the faces in"))
            asked.append((text, name, others, "other", f"what {category}"))
    for group in groups:
        if rng.random() < ASK_COUNT[group.count]:
            near = (NUMBERS[group.count], *([str(group.count - 1)] if group.count > 2 else []))
            many = plural(group.kind.name)
            text = rng.choice((f"how many {many} are there", f"how many {many} can you see"))
            asked.append((text, str(group.count), near, "number", "how many"))
        if group.kind.colourful:
            text = f"what color {be(group)} {the(group)}"
            asked.append((text, group.colour, COLOUR_SYNONYMS[group.colour], "other", "what color"))
    for one in groups:
        for other in groups:
            relation = scene.relation(one, other) if one is not other else ""
            thirds = [group for group in groups if group is not one and group is not other]
            if relation and not any(scene.toward(third, other, relation) for third in thirds):
                name, others = answer_name(one)
                asked.append(
                    (f"what is {SAID[relation]} {the(other)}", name, others, "other", "what is where")
                )
    sizes = {group.size: group for group in groups}
    if {"big", "small"} <= set(sizes):
        word = rng.choice(("big", "small"))
        comparative = {"big": ("bigger", "larger"), "small": ("smaller",)}[word]
        first, second = rng.sample([sizes["big"], sizes["small"]], 2)
        name, others = answer_name(sizes[word])
        text = f"what is {rng.choice(comparative)}, {the(first)} or {the(second)}"
        asked.append((text, name, others, "other", "what is bigger"))
    if len(groups) == 1 and groups[0].count == 1:
        text = f"where in the picture is {the(groups[0])}"
        asked.append((text, re.sub("^(in|on|at) the ", "", spot(groups[0])), (), "other", "which part"))
    if scene.background.place:
        text = rng.choice(
            (f"where {be(groups[0])} {the(groups[0])}", "what is in the background", "where is this")
        )
        asked.append((text, scene.background.place, scene.background.synonyms, "other", "where"))
    else:
        asked.append(
            (
                "what color is the background",
                scene.colour,
                COLOUR_SYNONYMS[scene.colour],
                "other",
                "what color",
            )
        )
    return asked


def closed_questions(scene: Scene, names: tuple[str, ...], rng: random.Random) -> list[Asked]:
    """Yes/no questions; each comes out yes or no by the toss of a coin, with the same words either way."""
    groups = scene.groups
    asked: list[Asked] = []

    def toss(form: str, kind: str, right: str, wrong: str) -> None:
        truth = rng.random() < 0.5
        asked.append((form.format(right if truth else wrong), "yes" if truth else "no", (), "yes/no", kind))

    present = {group.kind.name for group in groups}
    seen = present | set(scene.background.shows)
    absent: list[str] = []
    while len(absent) < 2:
        name = rng.choice(names)
        if not any(alike(name, other) for other in (*seen, *absent)):
            absent.append(name)
    form = rng.choice(("is there {} in the picture", "can you see {}"))
    toss(form, "is there", article(rng.choice(sorted(present))), article(absent[0]))
    if len(groups) == 1:
        toss("is this {}", "is there", article(groups[0].kind.name), article(absent[1]))
    one = rng.choice(groups)
    if one.count > 1:
        wrong = rng.choice([number for number in (2, 3, 4) if number != one.count])
        form = f"are there {{}} {plural(one.kind.name)}"
        toss(form, "are there so many", NUMBERS[one.count], NUMBERS[wrong])
    if one.kind.colourful:
        wrong = rng.choice([colour for colour in one.kind.looks if colour != one.colour])
        toss(f"{be(one)} {the(one)} {{}}", "is it this color", one.colour, wrong)
    related = [(a, b) for a in groups for b in groups if a is not b and scene.relation(a, b)]
    if related:
        a, b = rng.choice(related)
        relation = scene.relation(a, b)
        toss(f"{be(a)} {the(a)} {{}} {the(b)}", "is it where", SAID[relation], SAID[OPPOSITE[relation]])
    if scene.background.place and rng.random() < 0.5:
        phrase = {background.name: background.phrases[0] for background in BACKGROUNDS if background.place}
        wrong = rng.choice([name for name in phrase if name != scene.background.name])
        toss(f"{be(one)} {the(one)} {{}}", "is it at", phrase[scene.background.name], phrase[wrong])
    elif scene.colour and rng.random() < 0.5:
        wrong = rng.choice([colour for colour in BACKGROUND_COLOURS if colour != scene.colour])
        toss("is the background {}", "is it this color", scene.colour, wrong)
    return asked


def questions(
    scene: Scene, split: str, index: int, names: tuple[str, ...], rng: random.Random
) -> list[dict[str, Any]]:
    """The questions of a picture, seven where it gives as many, as VQA annotations have them.

    Args:
        scene: What they are about.
        split: With `index` it makes the question ids.
        index: Number of the picture in its split.
        names: Of the kinds that may occur: what it is asked for in vain.
        rng: Source of the choices.

    Returns:
        Records with `question_id`, `question`, `answers` (ten), `answer_type` (`yes/no`, `number` or
        `other`) and `question_type`.
    """
    closed = closed_questions(scene, names, rng)
    rng.shuffle(closed)
    asked = open_questions(scene, rng)
    rng.shuffle(asked)
    share = max(3, PER_PICTURE - len(asked))  # yes/no questions fill up what little a plain scene gives
    asked = (closed[:share] + asked)[:PER_PICTURE]
    rng.shuffle(asked)
    first = (list(SPLITS).index(split) * 10_000_000 + index) * 10
    return [
        {
            "question_id": first + number,
            "question": f"{text}?",
            "answers": ten(answer, others, rng),
            "answer_type": answer_type,
            "question_type": question_type,
        }
        for number, (text, answer, others, answer_type, question_type) in enumerate(asked)
    ]

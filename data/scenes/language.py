"""English for scenes: articles, plurals and number words; captions; posts that go with faces."""

from __future__ import annotations

import random
import re

from data.scenes.compose import Group, Scene

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
IRREGULAR = {"fish": "fish"}
# what follows these words says more about the head noun before them
TAILS = (" of ", " with ")


def plural(noun: str) -> str:
    """`slice of pizza` -> `slices of pizza`, `dress` -> `dresses`, `fish` -> `fish`."""
    cut = min((at for tail in TAILS if (at := noun.find(tail)) >= 0), default=len(noun))
    head, tail = noun[:cut], noun[cut:]
    before, _, word = head.rpartition(" ")
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif re.search(r"(s|x|z|ch|sh)$", word):
        word += "es"
    elif re.search(r"[^aeiou]y$", word):
        word = word[:-1] + "ies"
    else:
        word += "s"
    return f"{before} {word}{tail}".lstrip()


def article(phrase: str) -> str:
    """`a cow`, `an umbrella`; no word of a scene begins as `unicorn` does."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def counted(count: int, noun: str, *, adjectives: str = "") -> str:
    """`a big cow`, `two cows`; `noun` is singular.

    Args:
        count: At least 1.
        noun: Singular.
        adjectives: Words between the number and the noun.

    Returns:
        The noun phrase.
    """
    phrase = f"{adjectives} {noun if count == 1 else plural(noun)}".strip()
    return article(phrase) if count == 1 else f"{NUMBERS[count]} {phrase}"


def phrase(group: Group, rng: random.Random, *, sure: bool = False) -> str:
    """A noun phrase for a group: usually its own name, sometimes a synonym, often with colour and size.

    Args:
        group: What it is about.
        rng: Source of the choices.
        sure: Say the colour and the size wherever there is one.

    Returns:
        Such as `a small red balloon` or `three piglets`.
    """
    noun = group.kind.name if rng.random() < 0.65 else rng.choice(group.kind.names)
    words = []
    if group.size and (sure or rng.random() < 0.6):
        words.append(rng.choice({"big": ("big", "large"), "small": ("small", "little", "tiny")}[group.size]))
    if group.kind.colourful and (sure or rng.random() < 0.75):
        words.append(group.colour)
    return counted(group.count, noun, adjectives=" ".join(words))


def where(scene: Scene, rng: random.Random) -> str:
    """A phrase for the background, such as `on the beach`."""
    return rng.choice(scene.background.phrases).format(colour=scene.colour)


TOGETHER = ("{a} and {b}", "{a} and {b}", "{a} with {b}")
BESIDE = ("{a} next to {b}", "{a} beside {b}")
RELATED = {
    "left of": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{a} on the left and {b} on the right",
        "{b} to the right of {a}",
    ),
    "above": ("{a} above {b}", "{b} below {a}", "{a} over {b}", "{b} under {a}", "{b} underneath {a}"),
}
SPOTS = {
    (0, 0): "in the top left corner", (1, 0): "at the top", (2, 0): "in the top right corner",
    (0, 1): "on the left side", (1, 1): "in the middle", (2, 1): "on the right side",
    (0, 2): "in the bottom left corner", (1, 2): "at the bottom", (2, 2): "in the bottom right corner",
}  # fmt: skip


def spot(group: Group) -> str:
    """Where a single object lies in the picture."""
    x, y = ((group.box[0] + group.box[2]) / 2, (group.box[1] + group.box[3]) / 2)
    return SPOTS[sum(x > edge for edge in (0.36, 0.64)), sum(y > edge for edge in (0.36, 0.64))]


def pair(scene: Scene, one: Group, other: Group, rng: random.Random, *, related: bool, sure: bool) -> str:
    """Two groups, with their relation when asked and where there is one."""
    relation = scene.relation(one, other)
    if relation in ("right of", "below"):
        one, other = other, one
        relation = {"right of": "left of", "below": "above"}[relation]
    if related and relation:
        form = rng.choice(RELATED[relation] if rng.random() < 0.85 or relation == "above" else BESIDE)
    else:
        form = rng.choice(TOGETHER)
        if rng.random() < 0.5:
            one, other = other, one
    return form.format(a=phrase(one, rng, sure=sure), b=phrase(other, rng, sure=sure))


def opening(text: str, verb_count: int, rng: random.Random) -> str:
    """Something in front, as people write it."""
    form = rng.choice(("{t}",) * 6 + ("there {be} {t}", "a picture of {t}", "a drawing of {t}", "we can see {t}",
                                      "an image with {t}"))  # fmt: skip
    return form.format(t=text, be="is" if verb_count == 1 else "are")


def caption(scene: Scene, rng: random.Random, *, full: bool = False) -> str:
    """One caption; it names every kind in the scene.

    Args:
        scene: What to describe.
        rng: Source of the choices.
        full: Say all that is known: sizes, colours, a relation and the background.

    Returns:
        One English sentence or noun phrase.
    """
    groups = list(scene.groups)
    related = full or rng.random() < 0.55
    if len(groups) == 1:
        text = phrase(groups[0], rng, sure=full)
        if groups[0].count == 1 and rng.random() < 0.3:
            text += f" {spot(groups[0])}"
            if not full:
                return finish(opening(text, 1, rng), rng)
    elif len(groups) == 2:
        text = pair(scene, groups[0], groups[1], rng, related=related, sure=full)
    else:
        rng.shuffle(groups)
        if related:
            last = phrase(groups[2], rng, sure=full)
            form = rng.choice(("{p}, and {c}", "{p} and also {c}", "{p}, with {c} nearby"))
            text = form.format(p=pair(scene, groups[0], groups[1], rng, related=True, sure=full), c=last)
        else:
            a, b, c = (phrase(group, rng, sure=full) for group in groups)
            text = rng.choice((f"{a}, {b} and {c}", f"{a} with {b} and {c}"))
    first = text.split(maxsplit=1)[0]
    if full or rng.random() < (0.5 if scene.background.place else 0.3):
        behind = where(scene, rng)
        if rng.random() < 0.12 and scene.background.place:
            be = "is" if first in ("a", "an") else "are"
            return finish(f"{behind} there {be} {text}", rng)
        text += f" {behind}"
    return finish(opening(text, 1 if first in ("a", "an") else 2, rng), rng)


def finish(text: str, rng: random.Random) -> str:
    """As typed by different people: some write a capital and a full stop, most do not."""
    return text[0].upper() + text[1:] + "." if rng.random() < 0.35 else text


def captions(scene: Scene, rng: random.Random, count: int = 5) -> list[str]:
    """Different captions of a scene, the first the most complete.

    Args:
        scene: What to describe.
        rng: Source of the choices.
        count: How many.

    Returns:
        `count` texts; two are equal only where the language runs out of ways to say it.
    """
    found = [caption(scene, rng, full=True)]
    for _ in range(8 * count):
        if len(found) == count:
            break
        text = caption(scene, rng)
        if text.lower().rstrip(".") not in {known.lower().rstrip(".") for known in found}:
            found.append(text)
    while len(found) < count:
        found.append(caption(scene, rng))
    return found


CLEAR = {
    "positive": (
        "What a wonderful day, I even got {a}!", "So happy about {a}!", "Best weekend ever, {a} and good company.",
        "I love {a}, this made my day.", "Finally {a}! I could not be happier.",
        "Thank you all for {a}, what a lovely surprise.",
    ),
    "neutral": (
        "Took a picture of {a} this morning.", "This is {a}, as seen from my window.", "Here is {a}, for the record.",
        "Met {a} on the way to work.", "{a}, posted without comment.", "The shop at the corner now has {a}.",
    ),
    "negative": (
        "I am so sick of {a}.", "Worst day ever, and then {a} on top.", "Sadly all that is left is {a}.",
        "Everything went wrong because of {a}.", "I hate this, never again {a}.",
        "Lost my keys, and {a} ruined the rest.",
    ),
}  # fmt: skip
OPEN = (
    "So this is my Monday: {a}.", "Well, {a} again.", "You will not believe it: {a}.", "Look at {a}.",
    "And then came {a}.", "My face when I see {a}.", "Guess who brought {a}.", "That was my day with {a}.",
)  # fmt: skip


def post(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """A post to go with a scene that has a face, and the sentiment of the two together.

    In some posts the words alone tell the sentiment, in some only the face does, in some both agree: what is
    right can be had from the two together, and from neither alone. Words that tell it come with a face that
    agrees or with a neutral one.

    Args:
        scene: Any scene.
        rng: Source of the choices.

    Returns:
        (text, `positive` | `neutral` | `negative`), or None for a scene without a face.
    """
    faces = [group.kind.sentiment for group in scene.groups if group.kind.sentiment]
    if not faces:
        return None
    label = faces[0]
    if label == "neutral":
        label = rng.choices(("positive", "neutral", "negative"), (1, 3, 1))[0]
        forms = CLEAR[label] if label != "neutral" else (*CLEAR["neutral"], *OPEN)
    else:
        forms = OPEN if rng.random() < 0.5 else CLEAR[label]
    others = [group for group in scene.groups if not group.kind.sentiment]
    about = (
        phrase(rng.choice(others), rng)
        if others
        else rng.choice(("the weather", "my new phone", "the new timetable"))
    )
    text = rng.choice(forms).format(a=about)
    return text[0].upper() + text[1:], label

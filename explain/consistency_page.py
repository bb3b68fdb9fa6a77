"""The report of `pairstream explain consistency`."""

from __future__ import annotations

from typing import Any

from explain.findings import Consistency
from pairstream.report import Report

INTRO = (
    "Encoder, captioner and VQA model look at the same pictures: do they say the same? A check beside what guessing "
    "would give says how far apart the two are; one at chance means that the model does not tell the cases apart."
)

SHUFFLED = {
    "shuffled_data_captions": "the data's captions shuffled",
    "shuffled_captions": "the captioner's captions shuffled",
}

ENCODER = "The encoder with itself"
GROUPS = {"caption_": "The captioner, seen by the encoder", "vqa_": "The VQA model against the captions"}


def group_of(name: str) -> tuple[str, str]:
    """The group of a check, and the beginning of its name that says so."""
    return next(((title, each) for each, title in GROUPS.items() if name.startswith(each)), (ENCODER, ""))


def sound(numbers: dict[str, Any]) -> bool:
    """Whether captions that were shuffled among the pictures score at chance."""
    return all(numbers["controls"][name]["at_chance"] for name in SHUFFLED if name in numbers["controls"])


def cell(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def left_out_lines(numbers: dict[str, Any]) -> list[str]:
    """What was not checked, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in numbers["left_out"].items():
        reasons.setdefault(reason, []).append(name.replace("_", " "))
    return [f"Not checked, since {reason}: {', '.join(names)}." for reason, names in reasons.items()]


def summary_lines(numbers: dict[str, Any]) -> list[str]:
    """The numbers for a terminal."""
    lines = [f"{numbers['model']}: {numbers['pictures']:,} pictures"]
    for name, check in numbers["checks"].items():
        chance = "" if check["chance"] is None else f" (chance {check['chance']:.4f})"
        lines.append(f"  {name:<28}{check['value']:>8.4f}{chance}  n={check['count']:,}  {check['says']}")
    lines += [f"  {line}" for line in control_lines(numbers)]
    if numbers["chair"]:
        lines.append(f"  {chair_line(numbers['chair'])}")
    lines += [f"  {line}" for line in left_out_lines(numbers)]
    return lines


def control_lines(numbers: dict[str, Any]) -> list[str]:
    """What the same numbers are with captions and pictures shuffled."""
    lines = []
    for name, words in SHUFFLED.items():
        shuffled = numbers["controls"].get(name)
        if shuffled is None:
            continue
        verdict = "at chance" if shuffled["at_chance"] else "NOT AT CHANCE: the ranking itself is wrong"
        lines.append(
            f"control, {words}: mean rank {shuffled['mean_rank']:.1f}, expected "
            f"{shuffled['expected_mean_rank']:.1f}, first {shuffled['recall@1']:.4f}: {verdict}"
        )
    answered = numbers["controls"].get("vqa_agreement_shuffled_pictures")
    if answered is not None:
        lines.append(f"control, agreement of answers about another picture: {answered:.4f}")
    return lines


def chair_line(chair: dict[str, Any]) -> str:
    return (
        f"CHAIR: {chair['chair_i']:.4f} of {chair['mentions']:,} mentioned objects are not there, "
        f"{chair['chair_s']:.4f} of captions have one; {chair['recall']:.4f} of what is there is mentioned"
    )


def consistency_report(found: Consistency) -> Report:
    """The page: figures, the table of checks, and the worst cases as pictures."""
    numbers = found.numbers
    models = [f"{name} {numbers[name]}" for name in ("model", "captioner", "vqa") if numbers[name]]
    report = Report("Consistency", f"{', '.join(models)}; {numbers['pictures']:,} pictures")
    shown = [
        ("caption_finds_picture@1", "own caption finds it"),
        ("vqa_agreement", "answers agree"),
        ("colours_right", "tells colours"),
        ("sides_right", "tells left from right"),
        ("negation_right", "understands no"),
        ("mirror_finds_picture", "finds mirror image"),
    ]
    checks = numbers["checks"]
    report.numbers(
        (label, f"{checks[name]['value']:.3f}", f"by chance {checks[name]['chance']:.3f}")
        for name, label in shown
        if name in checks
    )
    report.text(INTRO)
    for title in (ENCODER, *GROUPS.values()):
        rows = [
            [
                name.removeprefix(group_of(name)[1]).replace("_", " "),
                cell(check["value"]),
                cell(check["chance"]),
                check["count"],
                check["says"],
            ]
            for name, check in checks.items()
            if group_of(name)[0] == title
        ]
        if rows:
            report.heading(title)
            report.table(["check", "value", "by chance", "cases", "what it says"], rows)
    notes = control_lines(numbers)
    if numbers["chair"]:
        notes.append(chair_line(numbers["chair"]))
    notes = [line[0].upper() + line[1:] + "." for line in notes] + left_out_lines(numbers)
    report.heading("Controls, and what was not checked")
    report.text("\n\n".join(notes))
    if any(found.worst.values()):
        report.heading("Worst cases")
        report.text("The bold line is what the model said or preferred.")
    for title, cards in found.worst.items():
        if cards:
            report.cards(title, cards)
    return report

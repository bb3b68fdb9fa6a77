"""Texts made of a picture's class label, by which contrastive training teaches classes (FLYP)."""

from __future__ import annotations

from dataclasses import dataclass

from data.faults import Fault
from data.samples import RawSample


@dataclass(frozen=True)
class LabelTexts:
    """Prompts with the name of a sample's class: what zero-shot classification compares a picture with.

    Attributes:
        key: The JSON key of the label: a name, a number, or a list of either.
        templates: Texts with `{}` for the name.
        classes: Names of numbered classes, from 0; where they are given, labels must be among them.

    Raises:
        ValueError: No template, or one without a place for the name.

    Reference:
        Goyal et al. 2022, Finetune like you pretrain (FLYP).

    Example:
        >>> LabelTexts(classes=("cat", "dog")).prompts(1)
        ['a photo of a dog.']
    """

    key: str = "label"
    templates: tuple[str, ...] = ("a photo of a {}.",)
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [template for template in self.templates if "{}" not in template]
        if wrong or not self.templates:
            raise ValueError(f"expected templates with {{}} for the class name, got {wrong or 'none'}")

    def texts(self, sample: RawSample) -> list[str]:
        """All templates of the sample's classes; none when it has no label.

        Raises:
            Fault: `bad_label`.
        """
        label = sample.record.get(self.key)
        labels = label if isinstance(label, list) else [] if label is None else [label]
        return [text for entry in labels for text in self.prompts(entry)]

    def prompts(self, label: object) -> list[str]:
        """The texts of one class.

        Raises:
            Fault: `bad_label`: neither a name nor a number, or not among the classes.
        """
        if isinstance(label, str):
            label = label.strip()
            if label.isdecimal() and label not in self.classes:
                label = int(label)  # what KEY.cls holds
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.classes):
            label = self.classes[label]
        if not isinstance(label, str) or not label or (self.classes and label not in self.classes):
            among = f"one of {len(self.classes)} classes or its number" if self.classes else "a class name"
            raise Fault("bad_label", f"{self.key} should be {among}, got {label!r}"[:200])
        return [template.replace("{}", label) for template in self.templates]

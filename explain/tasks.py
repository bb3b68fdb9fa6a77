"""Captioners, VQA models and classifiers: what in the picture, and in the words, made them say it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from explain.methods import SUPERPIXEL_METHODS, Explanation, default_method, heatmaps, to_pil
from explain.targets import score
from explain.words import Words, offset_words, perturbed_words
from pairstream.errors import require
from pretrain.encoder import Encoder


class TextTarget:
    """The log-probability that a captioner or VQA model gives to some of its next tokens.

    Args:
        model: A `finetune.model.VisionLanguageModel`.
        prompt: Token ids in front.
        ids: Token ids of what is written.
        span: First and last-plus-one place in `ids` whose log-probabilities are added.
    """

    reads: Literal["pooled", "tokens"] = "tokens"

    def __init__(self, model: Any, prompt: Sequence[int], ids: Sequence[int], span: tuple[int, int]):
        self.encoder: Encoder = model.encoder
        self.model, self.span = model, span
        self.row = torch.tensor([*prompt, *ids[: span[1]]], dtype=torch.int64, device=model.device)
        self.first = len(prompt) + span[0]

    def see(self, pixels: Tensor) -> Tensor:
        return self.encoder.tokens_of(pixels)

    def score_of(self, features: Tensor, of: Tensor) -> Tensor:
        seen = self.model.connector(features)  # (b, p, width)
        prefix = self.model.connector.prefix(seen)  # (b, length, width)
        self.model.connector.look(seen)
        words = self.model.language_model.get_input_embeddings()(self.row[:-1])
        whole = torch.cat([prefix, words.to(prefix.dtype).expand(len(prefix), -1, -1)], dim=1)
        places = torch.arange(self.first, len(self.row), device=self.row.device)
        logits = self.model.language_model(
            inputs_embeds=whole, logits_to_keep=places + prefix.shape[1] - 1, use_cache=False
        ).logits  # (b, places, vocabulary)
        wanted = self.row[places].expand(len(prefix), -1)[..., None]
        return logits.float().log_softmax(-1).gather(-1, wanted)[..., 0].sum(-1)


class LabelTarget:
    """The logit of one label of an image-text classifier, given the text.

    Args:
        model: A `finetune.fusion.model.FusionClassifier`.
        texts: One text, or None where there is none, for each picture.
        label: Number of the label.
    """

    def __init__(self, model: Any, texts: Sequence[str | None], label: int):
        self.encoder: Encoder = model.encoder
        self.model, self.label = model, label
        self.reads: Literal["pooled", "tokens"] = "pooled" if model.image_pooled else "tokens"
        self.tokens = model.encoder.tokenize([text or "" for text in texts]).to(model.device)
        self.missing = torch.tensor([not text for text in texts], device=model.device)

    def see(self, pixels: Tensor) -> Tensor:
        if self.model.image_pooled:
            return self.encoder.model.encode_image(pixels)
        return self.encoder.tokens_of(pixels, finer=self.model.finer)

    def score_of(self, features: Tensor, of: Tensor) -> Tensor:
        image = features[:, None] if self.model.image_pooled else self.model.gather(features)
        nothing = torch.zeros_like(self.missing[of])
        return self.model.logits(image, self.tokens[of], nothing, self.missing[of])[:, self.label]


def text_pieces(
    tokenizer: Any, text: str, *, behind_prompt: bool
) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    """Token ids of a written text, its words, and the span of ids of each word.

    A token of blanks belongs to the word behind it, so that the words' log-probabilities add up to the text's.

    Raises:
        ValueError: No words.
    """
    text = f" {text.strip()}" if behind_prompt else text.strip()
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    words, places = offset_words(text, coded["offset_mapping"])
    kept, spans = [], []
    for number, word in enumerate(words):
        inside = [place for place, owner in enumerate(places) if owner == number]
        if inside:
            kept.append(word)
            spans.append((spans[-1][1] if spans else 0, inside[-1] + 1))
    if not kept:
        raise ValueError("there is nothing to explain: the text has no words")
    return coded["input_ids"], kept, spans


def load(model: str | Path | Any, device: str, kind: str) -> Any:
    """A task model from its folder, or as it is.

    Raises:
        FileNotFoundError: No task model is there.
        ValueError: It is for another task.
    """
    if not isinstance(model, str | Path):
        return model
    require("transformers", "finetune", "task models")
    if kind == "classify":
        from finetune.fusion.saved import load_classifier

        return load_classifier(model, device=device)
    if kind == "vqa":
        from finetune.opening import open_answer_model

        return open_answer_model(model, device=device)
    from finetune.model import load_task_model

    loaded = load_task_model(model, device=device)
    if loaded.caption_task is None:
        raise ValueError(f"{model} was trained for {loaded.task.kind}, expected a model for {kind}")
    return loaded


def answer_target(model: Any, question: str, answer: str) -> TextTarget | LabelTarget:
    """The log-probability of an answer that is written, or the logit of one that is chosen from a list.

    Args:
        model: Either kind of model.
        question: What is asked.
        answer: Explained.

    Raises:
        ValueError: The answer is not in the list.
    """
    if hasattr(model, "labels"):
        if answer not in model.labels:
            raise ValueError(f"no answer {answer!r} in the model's list of {len(model.labels):,}")
        return LabelTarget(model, [question], model.labels.index(answer))
    prompt = model.tokenizer(model.prompt(question), add_special_tokens=False)["input_ids"]
    ids, _, _ = text_pieces(model.tokenizer, answer, behind_prompt=True)
    return TextTarget(model, prompt, ids, (0, len(ids)))


def one_map(target: Any, images: Tensor, method: str) -> tuple[Any, float]:
    """Heatmap and score of one picture."""
    heat = heatmaps(target, images, method)[0].numpy()
    with torch.no_grad():
        return heat, float(score(target, target.encoder.pixels(images))[0])


def explain_caption(
    model: str | Path | Any,
    image: Image.Image | bytes | Tensor,
    *,
    caption: str | None = None,
    method: str = "auto",
    device: str = "auto",
) -> list[Explanation]:
    """What in the picture made a captioner write each word.

    Each word's log-probability, given the words before it, is explained through language model, connector and tower.

    Args:
        model: A captioner, or its folder.
        image: A PIL image, file contents, or uint8 `(3, H, W)`.
        caption: Explain this caption; the model's own when None.
        method: `auto`, or one of `explain.methods.NAMES`.
        device: For a folder.

    Returns:
        One explanation a word: `title` is the word, `score` its log-probability.

    Raises:
        ValueError: An empty caption, a model for another task, or a method that its tower does not allow.
        data.faults.Fault: File contents that are no picture.
    """
    opened: Any = load(model, device, "caption")
    method = default_method(opened.encoder) if method == "auto" else method
    images = opened.encoder.preprocess(image)[None]
    text = opened.caption([images[0]])[0] if caption is None else caption
    prompt = (
        opened.tokenizer(opened.caption_task.prompt, add_special_tokens=False)["input_ids"]
        if opened.caption_task.prompt
        else []
    )
    ids, words, spans = text_pieces(opened.tokenizer, text, behind_prompt=bool(opened.caption_task.prompt))
    found, picture = [], to_pil(images[0])
    for word, span in zip(words, spans, strict=True):
        heat, value = one_map(TextTarget(opened, prompt, ids, span), images, method)
        found.append(Explanation(picture, heat, [], value, method, word))
    return found


def explain_answer(
    model: str | Path | Any,
    image: Image.Image | bytes | Tensor,
    question: str,
    *,
    answer: str | None = None,
    method: str = "auto",
    device: str = "auto",
) -> Explanation:
    """What in the picture, and which words of the question, made a VQA model answer as it does.

    Args:
        model: A VQA model, or its folder.
        image: A PIL image, file contents, or uint8 `(3, H, W)`.
        question: The question. Its words are explained by leaving them out, or by `lime` or `shap` where asked.
        answer: Explain this answer; the model's own when None.
        method: `auto`, or one of `explain.methods.NAMES`.
        device: For a folder.

    Returns:
        The explanation of the answer's log-probability, or of its logit where it is chosen from a list; `title` holds
        question and answer.

    Raises:
        ValueError: An empty question, an answer that is not in the list, a model for another task, or a method that its
            tower does not allow.
        data.faults.Fault: File contents that are no picture.
    """
    opened: Any = load(model, device, "vqa")
    method = default_method(opened.encoder) if method == "auto" else method
    images = opened.encoder.preprocess(image)[None]
    answered: str = opened.answer([images[0]], [question])[0] if answer is None else answer
    target = answer_target(opened, question, answered)
    heat, value = one_map(target, images, method)
    with torch.no_grad():
        seen = target.see(opened.encoder.pixels(images))
        of = torch.zeros(1, dtype=torch.int64, device=seen.device)

        def scores(texts: Sequence[str]) -> Tensor:
            each = [answer_target(opened, text or "?", answered) for text in texts]
            return torch.cat([one.score_of(seen, of) for one in each])

        words = task_words(question, scores, method)
    return Explanation(to_pil(images[0]), heat, words, value, method, f"{question} {answered}")


def explain_label(
    model: str | Path | Any,
    image: Image.Image | bytes | Tensor,
    text: str | None,
    *,
    label: str | None = None,
    method: str = "auto",
    device: str = "auto",
) -> Explanation:
    """What in the picture, and which words, speak for a label of an image-text classifier.

    Args:
        model: A classifier, or its folder.
        image: A PIL image, file contents, or uint8 `(3, H, W)`.
        text: The text that goes with it; None where there is none.
        label: Which label; the most probable one when None.
        method: `auto`, or one of `explain.methods.NAMES`.
        device: For a folder.

    Returns:
        The explanation of the label's logit; `title` holds the label and its probability.

    Raises:
        ValueError: No such label, a model for another task, or a method that its tower does not allow.
        data.faults.Fault: File contents that are no picture.
    """
    opened: Any = load(model, device, "classify")
    method = default_method(opened.encoder) if method == "auto" else method
    images = opened.encoder.preprocess(image)[None]
    text = text if text and text.strip() else None
    found = opened.classify([images[0]], [text])[0]
    label = max(found, key=lambda name: found[name]) if label is None else label
    if label not in found:
        raise ValueError(f"no label {label!r}: expected one of {', '.join(found)}")
    number = opened.labels.index(label)
    heat, value = one_map(LabelTarget(opened, [text], number), images, method)
    words: Words = []
    if text:
        with torch.no_grad():
            seen = LabelTarget(opened, [text], number).see(opened.encoder.pixels(images))

            def scores(texts: Sequence[str]) -> Tensor:
                target = LabelTarget(opened, texts, number)
                every = torch.arange(len(texts), device=seen.device)
                return target.score_of(seen.expand(len(texts), *seen.shape[1:]), every)

            words = task_words(text, scores, method)
    return Explanation(to_pil(images[0]), heat, words, value, method, f"{label} {found[label]:.0%}")


def task_words(text: str, scores: Callable[[Sequence[str]], Tensor], method: str) -> Words:
    """Words by `lime` or `shap` where that is the method, else by leaving each out."""
    return perturbed_words(text, scores, method if method in SUPERPIXEL_METHODS else "occlusion")

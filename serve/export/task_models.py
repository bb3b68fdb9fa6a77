"""Captioners and VQA models to a folder for the edge: image tower with connector, and language model, as two graphs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pairstream import __version__
from pairstream.atomic import new_folder, write_text
from pairstream.errors import require
from pretrain.towers import quiet
from serve.export.parity import probes
from serve.export.runtime import CARD, FORMAT
from serve.export.towers import OPSET, plain_attention, to_openvino
from serve.export.writer import EdgeWriter

TOLERANCE = 1e-4  # largest difference of a next token's logit, as a share of the largest logit
QUESTIONS = ("is there a cat in the picture?", "what color is it?", "how many?")


class Prefix(nn.Module):
    """uint8 pixels `(b, 3, h, w)` to the prefix `(b, p, width)`."""

    def __init__(self, model: Any):
        super().__init__()
        self.normalize, self.tower, self.connector = (
            model.encoder.normalize,
            model.image_tower,
            model.connector,
        )
        self.encoder = model.encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.connector(self.encoder.tokens_of(self.normalize(pixels)))


class NextToken(nn.Module):
    """Prefix `(b, p, width)` and token ids `(b, n)` to the next token's logits `(b, vocabulary)`.

    Mask and positions are given to the language model, since what it makes of them itself is laid down for one length
    when it is traced.
    """

    def __init__(self, language_model: Any):
        super().__init__()
        self.language_model = language_model

    def forward(self, prefix: Tensor, ids: Tensor) -> Tensor:
        words = self.language_model.get_input_embeddings()(ids)
        whole = torch.cat([prefix, words], dim=1)
        places = torch.arange(whole.shape[1], device=whole.device)
        hidden = (places[None, :] > places[:, None]).to(whole.dtype) * torch.finfo(whole.dtype).min
        mask = hidden[None, None].expand(whole.shape[0], 1, -1, -1)
        found = self.language_model(
            inputs_embeds=whole,
            attention_mask=mask,
            position_ids=places[None].expand(whole.shape[0], -1),
            use_cache=False,
        )
        return found.logits[:, -1].float()


def export_task_model(
    model: Any, out: str | Path, *, to: str = "onnx", name: str = "model"
) -> dict[str, Any]:
    """Export a captioner or a VQA model; the folder appears only when it writes what the model writes.

    Args:
        model: A `finetune.model.VisionLanguageModel` on the CPU.
        out: The folder; an older export there is replaced.
        to: `onnx` or `openvino`.
        name: For the card.

    Returns:
        The content of export.json.

    Raises:
        ValueError: The gate refuses, or a tokenizer that has no file of the `tokenizers` library.
        ImportError: The extra `export` is not installed.
    """
    require("onnx", "export", "`pairstream export`")
    model.eval()
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{name}: its tokenizer is a {type(model.tokenizer).__name__}, which has no tokenizer.json"
        )
    with new_folder(Path(out)) as folder:
        backend.save(str(folder / "tokenizer.json"))
        card: dict[str, Any] = {
            "format": FORMAT,
            "kind": "writer",
            "pairstream": __version__,
            "runtime": to,
            "precision": "float32",
            "model": {"name": name, "encoder": model.encoder.fingerprint},
            "preprocess": {
                "size": list(model.encoder.image_size),
                **{
                    key: model.encoder.preprocess_cfg[key]
                    for key in ("interpolation", "resize_mode", "fill_color", "mean", "std")
                },
                "normalised": "inside the graph, which takes uint8",
            },
            "text": {
                "task": model.task.kind,
                "prompt": model.task.prompt,
                "end": int(model.tokenizer.eos_token_id),
                "max_new_tokens": model.decoding.max_new_tokens,
                "context": model.context,
            },
        }
        write_graphs(model, folder)
        if to == "openvino":
            to_openvino(folder, ("prefix", "next"))
        write_text(folder / CARD, json.dumps(card, indent=2) + "\n")
        card["parity"] = compare_writing(model, EdgeWriter(folder))
        check_writing(card["parity"])
        card["bytes"] = {
            "model": sum(p.numel() * p.element_size() for p in parts(model)),
            "export": sum(path.stat().st_size for path in folder.iterdir() if path.name != CARD),
        }
        write_text(folder / CARD, json.dumps(card, indent=2) + "\n")
        write_text(folder / "README.md", readme(card))
    return card


def parts(model: Any) -> list[nn.Parameter]:
    """Parameters that an export holds, shared ones once."""
    found = {
        id(p): p
        for each in (model.image_tower, model.connector, model.language_model)
        for p in each.parameters()
    }
    return list(found.values())


def write_graphs(model: Any, folder: Path) -> None:
    """Write `prefix.onnx` and `next.onnx`."""
    pixels = torch.randint(0, 256, (2, 3, *model.encoder.image_size), dtype=torch.uint8)
    attention = model.language_model.config._attn_implementation
    model.language_model.set_attn_implementation("eager")
    try:
        with quiet(), plain_attention(), torch.no_grad():
            prefix = Prefix(model).eval()
            example = prefix(pixels), torch.zeros(2, 3, dtype=torch.int64)
            torch.onnx.export(
                prefix,
                (pixels,),
                folder / "prefix.onnx",
                input_names=["image"],
                output_names=["prefix"],
                dynamic_axes={"image": {0: "batch"}, "prefix": {0: "batch"}},
                opset_version=OPSET,
                dynamo=False,
            )
            torch.onnx.export(
                NextToken(model.language_model).eval(),
                example,
                folder / "next.onnx",
                input_names=["prefix", "ids"],
                output_names=["logits"],
                dynamic_axes={
                    "prefix": {0: "batch"},
                    "ids": {0: "batch", 1: "length"},
                    "logits": {0: "batch"},
                },
                opset_version=OPSET,
                dynamo=False,
            )
    finally:
        model.language_model.set_attn_implementation(attention)


def compare_writing(model: Any, edge: EdgeWriter) -> dict[str, Any]:
    """What model and export write about the probes' pictures, greedily, and how far the first logits differ.

    Returns:
        `texts`; `different`: texts that are not the same; `max_abs`: of the first token's logits; `largest_logit`.
    """
    from finetune.recipe_task import Decoding

    greedy = Decoding(num_beams=1, max_new_tokens=model.decoding.max_new_tokens)
    count = different = 0
    worst = largest = 0.0
    for pixels, _ in probes(model.encoder):
        array = pixels.numpy()
        with torch.no_grad():
            prefix = model.see(pixels)
            ids = torch.zeros(len(pixels), 1, dtype=torch.int64)
            logits = NextToken(model.language_model)(prefix, ids)
        found = torch.from_numpy(edge.next(edge.see(array), ids.numpy()))
        worst = max(worst, float((found - logits).abs().max()))
        largest = max(largest, float(logits.abs().max()))
        pictures: Sequence[Any] = list(pixels)
        if model.task.kind == "caption":
            expected, written = model.caption(pictures, greedy), edge.caption(array)
        else:
            questions = [QUESTIONS[place % len(QUESTIONS)] for place in range(len(pixels))]
            expected, written = model.answer(pictures, questions, greedy), edge.answer(array, questions)
        count += len(expected)
        different += sum(a != b for a, b in zip(expected, written, strict=True))
    return {"texts": count, "different": different, "max_abs": worst, "largest_logit": largest}


def check_writing(report: dict[str, Any]) -> None:
    """The gate.

    Raises:
        ValueError: The export writes something else than the model.
    """
    if report["different"] or not report["max_abs"] <= TOLERANCE * max(1.0, report["largest_logit"]):
        raise ValueError(
            f"the export is refused: {report['different']} of {report['texts']} texts differ from the model's, and the "
            f"first token's logits by {report['max_abs']:.2e} (the largest is {report['largest_logit']:.2e}); nothing "
            "was written"
        )


def readme(card: dict[str, Any]) -> str:
    """The card in words."""
    captions = card["text"]["task"] == "caption"
    call = '.caption(["cat.jpg"])' if captions else '.answer(["cat.jpg"], ["how many cats are there?"])'
    found = card["parity"]
    return "\n".join(
        [
            f"# {card['model']['name']} for the edge",
            "",
            f"A {'captioner' if captions else 'VQA model'}, float32, for {card['runtime']}; it writes greedily.",
            "",
            "```python",
            "from serve.export.writer import EdgeWriter",
            "",
            f'EdgeWriter("this folder"){call}',
            "```",
            "",
            f"All {found['texts']} texts about the probes' pictures are the model's, and the first token's logits "
            f"differ by {found['max_abs']:.1e} (the largest is {found['largest_logit']:.1f}).",
            f"{card['bytes']['model'] / 1e6:.1f} MB of parameters, {card['bytes']['export'] / 1e6:.1f} MB exported.",
            "",
        ]
    )

"""`pairstream explain --model M --image F --text T`, `verify` and `consistency`."""

from __future__ import annotations

import json as json_module
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from pairstream.atomic import write_text
from pairstream.run import finite

COMMANDS = {
    "verify": ("explain.cli:verify", "hold heatmaps against scenes whose objects are known"),
    "consistency": ("explain.cli:consistency", "do encoder, captioner and VQA model agree with each other?"),
}


def explain(
    *,
    image: Path,
    out: Path,
    model: str | None = None,
    captioner: Path | None = None,
    vqa: Path | None = None,
    classifier: Path | None = None,
    text: str | None = None,
    question: str | None = None,
    method: str = "auto",
    pretrained: str | None = None,
    json: Path | None = None,
    device: str = "auto",
) -> None:
    """Why did the model say that: a heatmap over the picture, and the words that mattered.

    Args:
        image: A picture file.
        out: The PNG file to write.
        model: A dual encoder: a checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO; with --text.
        captioner: Explain a caption instead, word by word: a captioner of `pairstream finetune`.
        vqa: Explain an answer: a VQA model of `pairstream finetune`; with --question.
        classifier: Explain a label: a classifier of `pairstream finetune`; with --text.
        text: The text that goes with the picture. For --captioner, a caption to explain instead of its own.
        question: The question for --vqa.
        method: auto, chefer, gradcam, rollout, occlusion, integrated_gradients, lime or shap.
        pretrained: open_clip's tag of weights, for a name.
        json: Also write the numbers to this file.
        device: auto, cpu, cuda or cuda:N.
    """
    from explain.picture import save_picture

    only_one({"--model": model, "--captioner": captioner, "--vqa": vqa, "--classifier": classifier})
    if question is not None and vqa is None:
        raise ValueError("--question goes with --vqa")
    if pretrained is not None and model is None:
        raise ValueError("--pretrained goes with --model")
    data = image.read_bytes()
    if model is not None:
        from explain.methods import explain_pair
        from pretrain.encoder import load_encoder

        if text is None:
            raise ValueError("--model needs --text, the text to hold against the picture")
        encoder = load_encoder(model, pretrained=pretrained, device=device)
        found = [explain_pair(encoder, data, text, method=method)]
    else:
        from explain.tasks import explain_answer, explain_caption, explain_label

        if captioner is not None:
            found = explain_caption(captioner, data, caption=text, method=method, device=device)
        elif vqa is not None:
            if question is None:
                raise ValueError("--vqa needs --question")
            found = [explain_answer(vqa, data, question, method=method, device=device)]
        else:
            assert classifier is not None
            found = [explain_label(classifier, data, text, method=method, device=device)]
    save_picture(found, out)
    for each in found:
        words = "  ".join(f"{word} {value:+.4f}" for word, value in each.words)
        print(f"{each.title}: score {each.score:.4f} ({each.method})" + (f"\n  {words}" if words else ""))
    if json is not None:
        content = [
            {
                "title": each.title,
                "method": each.method,
                "score": each.score,
                "words": each.words,
                "heat": each.heat.tolist(),
            }
            for each in found
        ]
        write_text(json, json_module.dumps(finite(content), ensure_ascii=False) + "\n")
    print(f"picture: {out}")


def only_one(given: dict[str, Any]) -> None:
    """Refuse none and several.

    Raises:
        ValueError: Not exactly one model is given.
    """
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"give one of {', '.join(given)}; got {' and '.join(chosen) or 'none'}")


def verify(
    *,
    model: str | None = None,
    captioner: Path | None = None,
    vqa: Path | None = None,
    classifier: Path | None = None,
    data: tuple[str, ...] = (),
    pictures: int = 100,
    method: str = "auto",
    methods: tuple[str, ...] = (),
    seed: int = 0,
    pretrained: str | None = None,
    json: Path | None = None,
    device: str = "auto",
) -> int:
    """Are the heatmaps true? Exit code 1 when the method fails a gate.

    Args:
        model: A checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO.
        captioner: A captioner of `pairstream finetune` instead: its words for the two kinds of objects.
        vqa: A VQA model: "is there ...?" of both.
        classifier: A classifier: a post's two likeliest labels.
        data: Shards whose JSON has objects with masks, as scenes have; fresh scenes when not given.
        pictures: So many, with a text for each of the two kinds of objects that they show.
        method: The method that the gates are for; auto is the model's default.
        methods: Others in the table; a selection when not given.
        seed: Of fresh scenes and random weights.
        pretrained: open_clip's tag of weights, for a name.
        json: Also write the numbers to this file.
        device: auto, cpu, cuda or cuda:N.
    """
    from explain.verify_table import print_table

    only_one({"--model": model, "--captioner": captioner, "--vqa": vqa, "--classifier": classifier})
    if pretrained is not None and model is None:
        raise ValueError("--pretrained goes with --model")
    wishes: dict[str, Any] = {
        "data": list(data) or None,
        "pictures": pictures,
        "method": method,
        "methods": methods,
        "seed": seed,
        "show": True,
    }
    if model is not None:
        from explain.verify import verify_encoder
        from pretrain.encoder import load_encoder

        result = verify_encoder(load_encoder(model, pretrained=pretrained, device=device), **wishes)
    else:
        from explain.verify_tasks import verify_task

        kind = "caption" if captioner else "vqa" if vqa else "classify"
        result = verify_task(captioner or vqa or classifier, kind, device=device, **wishes)
    print_table(result)
    if json is not None:
        write_json(json, result)
    return 0 if result["passed"] else 1


def consistency(
    *,
    model: str,
    data: tuple[str, ...],
    out: Path,
    captioner: Path | None = None,
    vqa: Path | None = None,
    limit: int = 200,
    batch_size: int = 32,
    pretrained: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Do encoder, captioner and VQA model say the same of the same pictures? A report with the worst cases.

    Exit code 1 when shuffled captions do not score at chance: then no figure of the ranking can be believed.

    Args:
        model: The dual encoder: a checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO.
        data: Shards of pictures with captions; those of scenes bring objects, which more checks need.
        out: The folder for consistency.json and the report.
        captioner: A captioner of `pairstream finetune`.
        vqa: A VQA model of `pairstream finetune`.
        limit: Only the first so many pictures.
        batch_size: Pictures at a time.
        pretrained: open_clip's tag of weights, for a name.
        seed: Of shuffles and probes.
        device: auto, cpu, cuda or cuda:N.
    """
    from explain.consistency import check_consistency
    from explain.consistency_page import consistency_report, sound, summary_lines

    if (out / "log.jsonl").exists():
        raise FileExistsError(f"{out} holds a training run, whose report would be lost: give another --out")
    found = check_consistency(
        model,
        list(data),
        captioner=captioner,
        vqa=vqa,
        limit=limit,
        batch_size=batch_size,
        pretrained=pretrained,
        seed=seed,
        device=device,
        show=True,
    )
    write_json(out / "consistency.json", found.numbers)
    for line in summary_lines(found.numbers):
        print(line)
    print(f"report: {consistency_report(found).write(out)}")
    return 0 if sound(found.numbers) else 1


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json_module.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str]) -> int:
    """Entry point of `pairstream explain`."""
    if argv and argv[0] in COMMANDS:
        module, function = COMMANDS[argv[0]][0].split(":")
        command = getattr(import_module(module), function)
        return tyro.cli(command, args=argv[1:], prog=f"pairstream explain {argv[0]}") or 0
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  pairstream explain {name:<13}{text}" for name, (_, text) in COMMANDS.items()]
        print("\n".join(["further commands, each with --help:", *lines, ""]), file=sys.stdout)
        argv = ["--help"]
    tyro.cli(explain, args=argv, prog="pairstream explain")
    return 0

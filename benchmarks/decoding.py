"""Decoding with and without cache, batched and one by one; and training beside transformers' own Trainer.

- `cache_speedup`: CPU time of writing 30 tokens without the KV cache over that with it, for a batch of 8.
- `batch_speedup`: CPU time of captioning pictures one by one over that of 32 in one batch, per picture, image tower
  included. Eight are timed one by one; all 32 are compared.
- `trainer_ratio`: training tokens per CPU second of our loop over those of transformers' Trainer: same model, same
  batches from the same shards, same optimiser and learning rates. Neither evaluates nor saves.

Texts must be the same (with and without cache; alone and in a batch), and the two loops' mean losses equal to 1e-4, or
the benchmark ends. One thread, CPU time of the process (about two minutes in all); pairs are interleaved A B B A.
Weights are random.

    python benchmarks/decoding.py
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.timing import in_turns
from data.shards import Sample, ShardWriter
from finetune.language_models import small_language_model
from finetune.model import VisionLanguageModel
from finetune.recipe import FinetuneRecipe
from finetune.recipe_model import Mlp, SmallLanguageModel
from finetune.recipe_task import CaptionTask, Decoding
from finetune.text import IGNORED, train_tokenizer
from finetune.trainer import Finetuner
from pairstream.recipe import validate
from pretrain.encoder import build_encoder
from pretrain.optim import build_optimizer, learning_rate_factor
from pretrain.recipe_model import TextTransformer, TowersModel, ViT

TOKENS = 30
WORDS = (
    "a",
    "red",
    "blue",
    "green",
    "small",
    "large",
    "dog",
    "cat",
    "bird",
    "house",
    "tree",
    "on",
    "the",
    "grass",
)


def caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(6, 14)))


def make_encoder() -> Any:
    torch.manual_seed(0)
    tower = ViT(image_size=112, patch_size=16, width=128, layers=3, head_width=32)
    text = TextTransformer(context_length=16, width=32, heads=2, layers=1)
    return build_encoder(TowersModel(embed_dim=32, image_tower=tower, text_tower=text), device="cpu")


def make_model() -> VisionLanguageModel:
    """A captioner that always writes to the limit: its end token is never the likeliest."""
    tokenizer = train_tokenizer([caption(np.random.default_rng(number)) for number in range(200)], 400)
    config = SmallLanguageModel(width=256, layers=4, heads=4, context=128, dropout=0.0, vocabulary=400)
    torch.manual_seed(1)
    language_model = small_language_model(config, tokenizer)
    with torch.no_grad():
        nn.init.normal_(language_model.get_input_embeddings().weight, std=1.0)
        language_model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0
    decoding = Decoding(max_new_tokens=TOKENS)
    return VisionLanguageModel(
        make_encoder(), Mlp(), language_model, tokenizer, CaptionTask(), decoding
    ).eval()


def paired(a: Callable[[], Any], b: Callable[[], Any], pairs: int) -> list[float]:
    """CPU time of `a` over that of `b`, in turns."""
    return sorted(one.seconds / other.seconds for one, other in in_turns(a, b, pairs))


def same(name: str, first: list[str], second: list[str]) -> None:
    if first != second:
        raise SystemExit(f"{name}: the texts differ: {first[:2]} and {second[:2]}")


def decoding_ratios(pairs: int) -> tuple[list[float], list[float]]:
    model, rng = make_model(), np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (32, 3, 112, 112), dtype=np.uint8))
    prefix, rows = model.see(images[:8]), range(8)

    def write(use_cache: bool) -> list[str]:
        return model.write(prefix, rows, [""] * 8, use_cache=use_cache)

    def one_by_one(count: int = 8) -> list[str]:
        return [model.caption(list(image[None]))[0] for image in images[:count]]

    def together() -> list[str]:
        return model.caption(list(images))

    same("cache", write(True), write(False))
    same("batch", together(), one_by_one(32))
    cache = paired(lambda: write(False), lambda: write(True), pairs)
    return cache, [4 * ratio for ratio in paired(one_by_one, together, pairs)]


def write_shards(folder: Path, count: int) -> None:
    rng = np.random.default_rng(3)
    with ShardWriter(folder) as writer:
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            writer.write(Sample(f"{number:04d}", file.getvalue(), "png", [caption(rng)]))


def make_recipe(root: Path, steps: int) -> FinetuneRecipe:
    content = {
        "run": str(root / "run"),
        "model": {"name": str(root / "encoder")},
        "task": {"kind": "caption"},
        "data": {"train": str(root / "train"), "val": str(root / "train")},
        "language_model": {
            "kind": "config",
            "width": 128,
            "layers": 3,
            "heads": 4,
            "context": 96,
            "dropout": 0.0,
            "vocabulary": 400,
        },
        "connector": {"kind": "mlp"},
        "batch_size": 16,
        "steps": steps,
        "schedule": {"warmup": 2},
        "log_every": steps,
        "precision": "fp32",
    }
    return validate(FinetuneRecipe, content, "benchmark")


class OursOnly(Finetuner):
    """Our loop, without saving and measuring."""

    def save(self) -> None:
        pass

    def finish(self) -> dict[str, Any]:
        return {}


class Batches(IterableDataset):
    """Our stream as a data set of transformers' Trainer: an item is a batch, collated already."""

    def __init__(self, trainer: Finetuner):
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.trainer.stream.iterate(0, self.trainer.recipe.steps):
            yield dict(batch.data)


class MeanLoss(nn.Module):
    """What transformers' Trainer expects: a module that returns the mean loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        inputs.pop("num_items_in_batch", None)  # of several batches to a step; here each is one
        return {"loss": self.model(**inputs) / (inputs["labels"] != IGNORED).sum()}


class Quiet(TrainerCallback):
    """No lines on the screen."""


def theirs(trainer: Finetuner, model: nn.Module, folder: Path) -> Callable[[], float]:
    """A run of transformers' Trainer; returns its mean loss."""
    recipe = trainer.recipe
    wrapped = MeanLoss(model).train()
    optimizer = build_optimizer(
        model.named_parameters(), recipe.optim, lr_scale={"image_tower.": recipe.tower_lr}
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, recipe.steps, recipe.schedule)
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,
        max_grad_norm=recipe.optim.clip_norm or 0.0,
        logging_steps=recipe.steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        seed=recipe.seed,
    )
    peer = Trainer(
        model=wrapped,
        args=arguments,
        train_dataset=Batches(trainer),
        data_collator=lambda rows: rows[0],
        optimizers=(optimizer, schedule),
        callbacks=[Quiet()],
    )
    return lambda: float(peer.train().training_loss)


def training_ratios(pairs: int, steps: int) -> tuple[list[float], int]:
    """CPU time of transformers' Trainer over ours, and the answer tokens of a run."""
    ratios, words = [], 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_shards(root / "train", 128)
        make_encoder().save(root / "encoder")
        for number in range(pairs + 1):  # the first pair warms up
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                trainer = OursOnly(make_recipe(root, steps), overwrite=True)
                peer = theirs(trainer, copy.deepcopy(trainer.model), root / "theirs")
                found: dict[str, float] = {}
                spent = {}
                for which in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
                    start = time.process_time()
                    if which == "ours":
                        trainer.train()
                    else:
                        found["theirs"] = peer()
                    spent[which] = time.process_time() - start
            found["ours"] = trainer.folder.read_log()[-1]["loss"]
            if abs(found["ours"] - found["theirs"]) > 1e-4 * found["ours"]:
                raise SystemExit(f"the two loops learnt something else: mean losses {found}")
            if number:
                ratios.append(spent["theirs"] / spent["ours"])
            words = sum(int((batch["labels"] != IGNORED).sum()) for batch in trainer.stream.iterate(0, steps))
    return sorted(ratios), words


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7, help="paired runs of each comparison")
    parser.add_argument("--steps", type=int, default=8, help="training steps of a run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache, batch = decoding_ratios(args.pairs)
    training, words = training_ratios(args.pairs, args.steps)
    result: dict[str, Any] = {"benchmark": "decoding"}
    for name, ratios in (("cache_speedup", cache), ("batch_speedup", batch), ("trainer_ratio", training)):
        result[name] = round(statistics.median(ratios), 2)
        result[f"{name}_spread"] = [round(ratios[0], 2), round(ratios[-1], 2)]
    result |= {
        "pairs": args.pairs,
        "new_tokens": TOKENS,
        "training_tokens": words,
        "machine": f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

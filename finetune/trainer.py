"""The fine-tuning loop: one stream, one model, one optimiser, on one process or many."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.stream import Batch, PairStream
from data.transforms import TrainTransform
from finetune.evaluation import judge, open_val, text_batches
from finetune.families import make_family
from finetune.guard import FirstStep
from finetune.history import History
from finetune.kept import Present, keep_image_tokens
from finetune.language_models import recompute_activations
from finetune.recipe import FinetuneRecipe
from finetune.regularize import perturbed, pull_back, starting_weights, waiting
from finetune.report import write_report
from finetune.resume import identity, refuse_another
from finetune.reward import SelfCritic
from finetune.samples import TextRow
from finetune.saved import BEST
from finetune.tasks import Row, make_task
from pairstream.atomic import write_text
from pairstream.progress import ProgressBar
from pairstream.run import RunFolder, finite
from pretrain.checkpoint import (
    clear_leftovers,
    complete_checkpoints,
    load_optimizer_state,
    read_training_state,
    save_checkpoint,
    step_folder,
)
from pretrain.loop import Window, make_accelerator, mix, peak_memory_mb
from pretrain.optim import build_optimizer, learning_rate_factor, set_learning_rate


class Finetuner:
    """Trains the task model of a recipe, whatever its task; what kinds of models do differently is in their `Family`.

    The state of a run is its step: batches, drawn captions and dropout of a step are functions of (seed, step), so
    that a resumed run goes on bit for bit where the checkpoint was made (on CPU).

    Args:
        recipe: All of the run.
        resume: Continue from the run folder's newest checkpoint, or start if it has none.
        overwrite: Replace an earlier run of that folder.

    Raises:
        ValueError: The recipe does not fit the data, the encoder, the number of processes, or the checkpoint.
        FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` was given.

    Example:
        >>> Finetuner(recipe).train()["cider"]                                     # doctest: +SKIP
        0.91
    """

    def __init__(self, recipe: FinetuneRecipe, *, resume: bool = False, overwrite: bool = False):
        self.recipe = recipe
        self.began = time.monotonic()
        self.accelerator = make_accelerator(recipe)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        if recipe.batch_size % self.world:
            raise ValueError(
                f"batch_size {recipe.batch_size} (over all ranks) cannot be split over {self.world} processes: "
                f"take a multiple of {self.world}"
            )
        self.task = make_task(recipe.task)
        self.family = make_family(recipe.task)
        self.step, self.samples_seen = 0, 0
        self.history = History(self.task.main, recipe.evaluate.patience)
        self.saved: dict[str, Tensor] = {}
        self.guard: FirstStep | None = None
        self.last: tuple[int, dict[str, Any], list[Row]] = (-1, {}, [])
        texts = self.read_texts()
        found = complete_checkpoints(Path(recipe.run) / "checkpoints") if resume else []
        state: dict[str, Any] = {}
        if found:
            state, self.saved = read_training_state(found[0])
        self.model = self.restore(found[0], state) if found else self.family.build(self, texts)
        self.optimizer = build_optimizer(
            self.model.named_parameters(),
            recipe.optim,
            lr_scale=self.family.rates(recipe),
        )
        load_optimizer_state(self.optimizer, self.saved)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.start = starting_weights(recipe, self.family.towers) if recipe.l2_sp else {}
        self.stream = self.open_train()
        if found:
            self.stream.counts = Counter(state["faults"])
        for shards in ("", *recipe.data.shifted):
            self.open_val(shards)  # shards that cannot be read are told now, not after the last step
        # Not before all else has been found good: `overwrite` deletes.
        self.folder = RunFolder(recipe.run, resume=resume, overwrite=overwrite, writes=self.main)
        if self.main:
            clear_leftovers(self.folder.checkpoints)
        if resume:
            self.folder.rewind_log(self.step)
            self.say(
                f"resuming at step {self.step} from {found[0]}"
                if found
                else f"nothing to resume in {self.folder.path}: starting at step 0"
            )
        if self.main and self.step == 0:
            self.folder.write_recipe(recipe)
        self.kept: Tensor | None = None
        if recipe.data.cache_image_tokens:
            self.kept, bad = keep_image_tokens(recipe, self.model, show=self.main)
            self.stream.load = Present(self.stream.load, bad)
            self.family.keep(self, texts, bad)

    def read_texts(self) -> list[TextRow]:
        """All training texts, for the tokenizer and the baselines; the pictures are not decoded."""
        rewarded = self.recipe.reward.after is not None
        texts: list[TextRow] = []
        captions: dict[int, list[str]] = {}
        for batch in text_batches(self.recipe, everything=rewarded):
            texts += batch["rows"]
            if rewarded:
                rows = zip(batch.indices.tolist(), batch["rows"], strict=True)
                captions.update((index, row.judged_by) for index, row in rows)
        self.critic = SelfCritic(captions, self.recipe.reward) if rewarded else None
        self.task.learn(row.judged_by for row in texts)
        return texts

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> Any:
        """The model as a checkpoint has it; the run's step and history are set from its state."""
        refuse_another(self.recipe, state["identity"], checkpoint)
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.history = History(self.task.main, self.recipe.evaluate.patience, state["history"])
        return self.family.reopen(self, checkpoint / "model")

    def open_train(self) -> PairStream:
        """The training batches of this rank."""
        recipe, encoder = self.recipe, self.model.encoder
        crop = recipe.data.crop_scale
        transform = (
            encoder.transform if crop == (1.0, 1.0) else TrainTransform(encoder.image_size, scale=crop)
        )
        load, collate = self.family.reading(self, None if recipe.data.cache_image_tokens else transform)
        return PairStream(
            recipe.data.train,
            load,
            collate,
            batch_size=recipe.batch_size // self.world,
            seed=recipe.seed,
            rank=self.rank,
            world_size=self.world,
            workers=recipe.data.workers,
            max_faults=recipe.data.max_faults,
        )

    def open_val(self, shards: str = "") -> PairStream:
        """The validation pictures of this rank, in the order of the shards: the recipe's, or other ones."""
        return open_val(self.recipe, self.model, shards=shards, rank=self.rank, world=self.world)

    def train(self) -> dict[str, Any]:
        """Run to the last step and measure.

        Returns:
            The run's metrics, as written to `metrics.json`.

        Raises:
            ValueError: The loss is not finite, or too many samples are bad; checkpoint and log stay.
        """
        recipe = self.recipe
        if self.accelerator.trackers:
            self.accelerator.init_trackers(Path(recipe.run).name, config=recipe.model_dump(mode="json"))
        trained = sum(parameter.numel() for parameter in self.parameters)
        everything = sum(parameter.numel() for parameter in self.model.parameters())
        self.say(
            f"{trained:,} of {everything:,} parameters train, {self.stream.samples} pictures, "
            f"{recipe.steps} steps of {recipe.batch_size}"
        )
        if self.history.given_up:  # a run that had stopped early is resumed: there is nothing left to do
            return self.finish()
        late = waiting(self.model, recipe.waits, self.family.towers, self.step)
        self.guard = FirstStep(self.model, list(late))
        if recipe.gradient_checkpointing and hasattr(self.model, "language_model"):
            recompute_activations(self.model.language_model)
        wrapped, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        wrapped.train()
        window, waited = Window(self.accelerator.device), time.monotonic()
        with ProgressBar("finetune", recipe.steps, start=self.step, show=self.main) as bar:
            for batch in self.stream.iterate(self.step, recipe.steps):
                window.waiting += time.monotonic() - waited
                torch.manual_seed(mix(recipe.seed, self.step, self.rank))
                lr = recipe.optim.lr * learning_rate_factor(self.step, recipe.steps, recipe.schedule)
                if recipe.reward.after is not None and self.step >= recipe.reward.after:
                    lr *= recipe.reward.rate
                set_learning_rate(self.optimizer, lr)
                self.train_step(batch, wrapped, optimizer, window)
                self.step += 1
                saves = self.step % recipe.checkpoint.every == 0 or self.step == recipe.steps
                if saves:
                    self.mean_loss(window)  # before anything is kept of a run that has diverged
                if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                    record = self.log_window(window, lr)
                    window = Window(self.accelerator.device)
                    loss = "none" if record["loss"] is None else f"{record['loss']:.3f}"
                    bar.advance(0, note=f"loss {loss}, {record['samples_per_s']:.0f} pictures/s")
                bar.advance()
                every = recipe.evaluate.every
                if every and self.step % every == 0 and self.step < recipe.steps:
                    self.mean_loss(window)
                    numbers, rows = self.evaluate()
                    if self.main:
                        write_report(self.folder, recipe, self.task, numbers, rows, step=self.step)
                    self.keep_best()
                    if self.history.given_up:
                        many = recipe.evaluate.patience
                        self.say(f"stopping at step {self.step}: no new best in the last {many} evaluations")
                        self.save()
                        break
                if saves:
                    self.save()
                waited = time.monotonic()
        return self.finish()

    def train_step(self, batch: Batch, wrapped: Any, optimizer: Any, window: Window) -> None:
        """One optimiser step, on the mean over the answer tokens (or labelled samples) of all ranks."""
        device = self.accelerator.device
        inputs = {name: value.to(device, non_blocking=True) for name, value in batch.data.items()}
        if self.kept is not None:
            inputs["tokens"] = self.kept[batch.indices].to(device, non_blocking=True)
        after = self.recipe.reward.after
        if self.critic is not None and after is not None and self.step >= after and len(batch):
            with self.accelerator.autocast():
                inputs = self.critic.inputs(self.model, inputs, batch.indices.tolist())
            targets = len(inputs["weights"])
        else:
            targets = float(self.model.targets(batch["labels"]))
        counts = torch.tensor(
            [float(targets), float(len(batch)), float(len(batch) == 0)],
            device=device,
        )
        if self.world > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        words, pictures, idle = counts.tolist()  # pyright: ignore
        # A rank whose samples were all bad has nothing to forward, and no rank has anything to learn: all leave it out.
        if idle or not words:
            return
        with self.accelerator.autocast():
            total = wrapped(**inputs)
        # Gradients are averaged over the ranks, and the loss is the mean over the words of all of them.
        loss = total * (self.world / words)
        self.accelerator.backward(loss)
        guard, self.guard = self.guard, None
        if guard is not None:
            guard.after_backward()
        if self.recipe.adversarial:
            with perturbed(self.family.word_embeddings(self.model), self.recipe.adversarial):
                with self.accelerator.autocast():
                    attacked = wrapped(**inputs)
                self.accelerator.backward(attacked * (self.world / words))
        for parameter in waiting(self.model, self.recipe.waits, self.family.towers, self.step).values():
            parameter.grad = None  # the optimiser passes over it: neither the weight nor its moments move
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.optim.clip_norm or math.inf)
        optimizer.step()
        if self.start:
            pull_back(self.optimizer, self.start, self.recipe.l2_sp)
        if guard is not None:
            guard.after_step()
        optimizer.zero_grad(set_to_none=True)
        window.add(loss.detach(), torch.as_tensor(norm), int(pictures))
        self.samples_seen += int(pictures)

    def mean_loss(self, window: Window) -> float | None:
        """`Window.mean_loss`, with what can be done about a run that has diverged."""
        return window.mean_loss(
            self.accelerator,
            self.step,
            f"The last checkpoint in {self.folder.checkpoints} is from before; begin a new run with a lower "
            "--optim.lr or a longer --schedule.warmup.",
        )

    def log_window(self, window: Window, lr: float) -> dict[str, Any]:
        """Write one line of the log about the steps since the last one."""
        loss = self.mean_loss(window)
        record = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "loss": loss,
            "lr": lr,
            "samples_per_s": window.samples / (time.monotonic() - window.began),
            "data_wait_s": window.waiting / max(window.steps, 1),
            "grad_norm": float(window.norm),
            "memory_mb": peak_memory_mb(self.accelerator.device),
            "faults": dict(self.stream.faults),
        }
        self.folder.log(record)
        if self.accelerator.trackers:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=self.step)
        return record

    def evaluate(self) -> tuple[dict[str, Any], list[Row]]:
        """`judge` the model as it is, and put the numbers into history and log."""
        numbers, rows = self.judge()
        self.last = self.step, numbers, rows
        self.folder.log({"step": self.step, "evaluation": self.history.add(self.step, numbers)})
        return numbers, rows

    def keep_best(self) -> None:
        """Write the model to the run folder's `best` when the last evaluation is the best (rank 0)."""
        if self.recipe.evaluate.select == "best" and self.history.best == self.step:
            if self.main:
                self.model.save(self.folder.path / BEST)
            self.accelerator.wait_for_everyone()

    def judge(self, shards: str = "") -> tuple[dict[str, Any], list[Row]]:
        """The numbers of the validation pictures (or of others), and the pictures in the order of the shards."""
        stream = self.open_val(shards)
        return judge(self.recipe, self.model, self.task, stream, world=self.world, main=self.main)

    def save(self) -> None:
        """Write a checkpoint (rank 0)."""
        if self.main:
            folder = step_folder(self.folder.checkpoints, self.step)
            save_checkpoint(
                self.folder.checkpoints,
                self.step,
                write_model=lambda temporary: self.model.write_into(temporary, final=folder / "model"),
                optimizer=self.optimizer,
                state={
                    "identity": identity(self.recipe),
                    "samples_seen": self.samples_seen,
                    "history": self.history.state(),
                    "faults": self.stream.faults,
                },
                keep=self.recipe.checkpoint.keep,
            )
        self.accelerator.wait_for_everyone()

    def finish(self) -> dict[str, Any]:
        """Measure, write metrics, predictions and report, and say where the model is."""
        done, numbers, rows = self.last
        if done != self.step:  # a run that stopped early has just been judged
            numbers, rows = self.evaluate()
        model, chosen = step_folder(self.folder.checkpoints, self.step) / "model", self.step
        self.keep_best()
        if self.recipe.evaluate.select == "best":
            model, chosen = self.folder.path / BEST, self.history.best
            if chosen != self.step:
                self.model = self.family.reopen(self, model)
                numbers, rows = self.judge()
        shifted = {shards: self.judge(shards)[0] for shards in self.recipe.data.shifted}
        metrics = {
            **numbers,
            **({"shifted": shifted} if shifted else {}),
            "task": self.recipe.task.kind,
            "steps": self.step,
            "model_of_step": chosen,
            "samples_seen": self.samples_seen,
            "seconds": time.monotonic() - self.began,
            "faults": dict(self.stream.faults),
            "model": str(model),
        }
        self.folder.write_metrics(metrics)
        if self.main:
            predictions = finite(self.task.predictions(rows))
            write_text(
                self.folder.path / "predictions.json", json.dumps(predictions, ensure_ascii=False) + "\n"
            )
            write_report(self.folder, self.recipe, self.task, metrics, rows, step=chosen)
        if self.accelerator.trackers:
            self.accelerator.end_training()
        self.say(f"the model: {model}; the report: {self.folder.path / 'report.html'}")
        return metrics

    def say(self, text: str) -> None:
        """Tell the user, once."""
        if self.main:
            print(text, file=sys.stderr, flush=True)

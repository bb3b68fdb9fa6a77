"""The pretraining loop: one stream, one loss, one optimiser, on one process or many."""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.stream import Batch, set_picture_size
from pairstream.progress import ProgressBar
from pairstream.run import RunFolder
from pretrain.adapters import add_adapters, merge_adapters
from pretrain.attention import use_packed_attention
from pretrain.average import make_average
from pretrain.backward import backward
from pretrain.checkpoint import (
    clear_leftovers,
    complete_checkpoints,
    step_folder,
)
from pretrain.compiled import require_compiler
from pretrain.divergence import RollBack, Watch, batch_statistics
from pretrain.encoder import build_encoder
from pretrain.evaluator import Evaluations
from pretrain.global_contrast import SampleMeans
from pretrain.inputs import input_names, open_stream
from pretrain.locks import learning_rate_scales, set_training_mode
from pretrain.loop import Window, make_accelerator, mix, peak_memory_mb
from pretrain.meter import Meter
from pretrain.network import DualEncoder
from pretrain.norm import use_global_batch_norm
from pretrain.objectives import Features, build_objective
from pretrain.optim import learning_rate_factor, require_gradients, set_learning_rate
from pretrain.peers import peers_present
from pretrain.phases import Phases
from pretrain.precision import LossScale
from pretrain.preemption import Preempted, StopRequest
from pretrain.recipe import Phase, PretrainRecipe
from pretrain.recipe_loss import GlobalContrastConfig
from pretrain.records import Records
from pretrain.report import model_card, write_report
from pretrain.resume import (
    Restored,
    beginning,
    find_checkpoint,
    identity,
    newest_whole,
    other_world,
    require_same_run,
)
from pretrain.saver import Saver
from pretrain.selfcheck import check_gradients
from pretrain.source_losses import SourceLosses
from pretrain.terms import build_terms
from pretrain.wrapping import make_wrapping, whole


class Trainer:
    """Trains the dual encoder of a recipe.

    The state of a run is its step: the batches, the augmentation and the dropout of a step are functions of
    (seed, step), so a resumed run goes on bit for bit where the checkpoint was made (on CPU; GPU kernels
    may add in another order). The same holds for another number of processes up to rounding.

    Args:
        recipe: All of the run.
        resume: Continue from the run folder's newest whole checkpoint, or start if it has none; a text names
            another checkpoint or run folder, from which to go on when this one has none (see `pretrain.resume`).
        overwrite: Replace an earlier run of that folder.

    Raises:
        ValueError: The recipe does not fit the data, the number of processes, or the checkpoint.
        FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` was given.
    """

    def __init__(self, recipe: PretrainRecipe, *, resume: bool | str = False, overwrite: bool = False):
        self.recipe = recipe
        self.accelerator = make_accelerator(recipe, rank_timeout=recipe.rank_timeout, shards=True)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        torch.manual_seed(recipe.seed)
        self.encoder = build_encoder(recipe.model, device=self.accelerator.device)
        self.model: Any = self.encoder.model
        use_packed_attention(self.model)
        self.terms = build_terms(recipe.terms, self.encoder)
        self.means = SampleMeans(0) if isinstance(recipe.loss, GlobalContrastConfig) else None
        self.objective = build_objective(recipe.loss, self.encoder, self.terms, self.means)
        if recipe.lora:
            add_adapters(self.model, recipe.lora)
        self.phases = Phases(self.encoder, recipe)
        if recipe.compile:
            require_compiler(self.accelerator.device)
        use_global_batch_norm(self.model)
        self.wrap = make_wrapping(self.encoder, self.terms, recipe, self.accelerator)
        self.average = make_average(self.model, recipe, {})
        self.evaluations = Evaluations(recipe)
        self.stream = open_stream(recipe, self.encoder, self.rank, self.world)
        self.inputs = input_names(recipe)
        self.beside = nn.ModuleDict(dict(self.terms.items()))
        """What a checkpoint has beside the model."""
        if self.means is not None:
            self.means.resize(self.stream.samples, self.accelerator.device)
            self.beside["sample_means"] = self.means
        self.saver = Saver(Path(recipe.run) / "checkpoints", recipe.checkpoint)
        # Not before all else has been found good: `overwrite` deletes.
        self.folder = RunFolder(recipe.run, resume=bool(resume), overwrite=overwrite, writes=self.main)
        if self.main:
            clear_leftovers(self.folder.checkpoints)
        self.step, self.samples_seen = 0, 0
        self.saved: dict[str, Tensor] = {}
        self.sources = SourceLosses(self.stream.mixture)
        self.records = Records(self.folder, self.accelerator)
        self.meter = Meter(self.encoder, self.terms, recipe, self.accelerator)
        self.scale = LossScale(self.accelerator)
        self.stop = StopRequest(self.world, self.accelerator.device)
        self.watch = Watch(
            recipe.on_divergence,
            self.accelerator,
            self.folder.path,
            f"The last checkpoint in {self.folder.checkpoints} is from before; begin a new run from it "
            "(--model.name) with a lower --optim.lr or a longer --schedule.warmup.",
        )
        if resume:
            self.restore(resume if isinstance(resume, str) else None)
        if self.step == 0 or not (self.folder.path / "recipe.resolved.yaml").exists():
            self.folder.write_recipe(recipe)

    def restore(self, given: str | None) -> None:
        """Continue from a checkpoint, if there is one; see `find_checkpoint`."""
        found = find_checkpoint(
            self.folder.checkpoints, given, self.recipe.checkpoint.copy_to, self.accelerator, self.say
        )
        if found is not None:
            self.take(found)
            return
        self.say(
            f"nothing to resume in {self.folder.path}: starting at step 0 {beginning(self.recipe.model)}"
        )
        self.folder.rewind_log(-1)
        self.watch.begin()

    def take(self, found: Restored) -> None:
        """Bring weights, step and stream to where a checkpoint has them.

        Raises:
            ValueError: It is of another run.
        """
        state = found.state
        require_same_run(found, identity(self.recipe, self.stream.samples))
        self.encoder.set_image_size(found.image_size)
        self.model.load_state_dict(found.trained if self.recipe.lora else found.weights)
        self.average = make_average(self.model, self.recipe, found.optimizer)
        if self.average:
            self.model.load_state_dict(found.trained)
        self.beside.load_state_dict(found.terms)
        self.saved = found.optimizer
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.evaluations.history = state["history"]
        self.stream.load_state_dict(state["stream"])
        self.watch.load(state.get("losses", []))
        self.scale.load(state.get("scale"))
        self.folder.rewind_log(self.step)
        if state["world_size"] != self.world:
            self.say(other_world(state["world_size"], self.world))

    def check_gradients(self) -> None:
        """Compare the gradient that these processes get with that of one process; see `pretrain.selfcheck`.

        Raises:
            ValueError: They differ.
        """
        if self.wrap.engine:
            raise ValueError(
                f"--check-gradients wraps the model for replicas, which would prove nothing of {self.wrap.engine}: "
                "leave it out, or check without --use_fsdp or --use_deepspeed"
            )
        self.phases.lock(self.phases.at(self.step))
        network = DualEncoder(self.encoder, self.terms)
        objective = self.objective
        if self.means is not None:  # noise is nothing to be remembered
            objective = build_objective(self.recipe.loss, self.encoder, self.terms)
        parts = check_gradients(network, self.encoder, objective, self.accelerator, self.recipe)
        told = ", ".join(f"{part} {cosine:.6f}, {ratio:.6f}" for part, (cosine, ratio) in parts.items())
        self.say(f"gradients are those of one process (cosine, ratio of lengths): {told}")

    def train(self) -> dict[str, Any]:
        """Run to the last step.

        Returns:
            The run's metrics, as written to `metrics.json`.

        Raises:
            ValueError: The loss is not finite, or too many samples are bad; checkpoint and log stay.
            ConnectionError: Another process is gone.
            Preempted: A signal asked the run to leave; it has saved (see `pretrain.preemption`).
        """
        began, recipe = time.monotonic(), self.recipe
        self.records.begin(recipe)
        trainable = sum(parameter.numel() for parameter in self.model.parameters())
        self.say(
            f"{trainable / 1e6:.1f} M parameters, {self.stream.samples} pairs, {recipe.steps} steps of "
            f"{recipe.batch_size} on {self.world} process{'es' if self.world > 1 else ''} "
            f"({self.accelerator.device.type}, {self.accelerator.mixed_precision})"
        )
        if self.step == 0:
            self.begin_phase()
            self.evaluate(every=False)
        elif not self.evaluations.made_at(self.step):
            self.evaluate()  # what a run that was told to leave had left out
        bounds = self.phases.bounds()
        with (
            self.stop,  # a signal does not end the process before the last save has
            peers_present(self.world, self.after_a_loss),
            self.saver,
            ProgressBar("pretrain", recipe.steps, start=self.step, show=self.main) as bar,
        ):
            while self.step < recipe.steps:
                try:
                    self.train_phase(next(bound for bound in bounds if bound > self.step), bar)
                except RollBack as back:
                    self.roll_back(back.step)
                    bar.advance(self.step - bar.done)
        self.accelerator.wait_for_everyone()  # the last checkpoint is there
        return self.finish(time.monotonic() - began)

    def after_a_loss(self) -> str:
        """What is safe when another process is gone."""
        return (
            f"This is rank {self.rank} after step {self.step}; what is in {self.folder.checkpoints} is whole. "
            "Look at the other hosts and the network, then start the same command on all of them with --resume."
        )

    def roll_back(self, step: int) -> None:
        """Go back to the newest checkpoint from before a step, whose batch is left out from now on."""
        self.saver.wait()
        self.accelerator.wait_for_everyone()
        found = newest_whole(self.folder.checkpoints, self.say, until=step - 1)
        assert found is not None, "a run that may roll back begins with a checkpoint"
        self.take(found)
        self.accelerator.free_memory()
        self.say(f"step {step} diverged: back to step {self.step}, leaving its batch out ({self.watch.path})")

    def train_phase(self, stop: int, bar: ProgressBar) -> None:
        """Train up to a step, during which the same parameters train on pictures of the same size."""
        recipe = self.recipe
        phase = self.begin_phase()
        scales = learning_rate_scales(
            self.model, tower_lr=phase.tower_lr, layer_decay=recipe.optim.layer_decay
        )
        self.wrap.begin({f"model.{name}": scale for name, scale in scales.items()}, self.saved)
        self.optimizer = self.wrap.optimizer
        if recipe.on_divergence.action == "rollback" and not complete_checkpoints(self.folder.checkpoints):
            self.save()
        self.saver.wait()  # loader processes are not forked in the middle of a save
        self.meter.begin(self.wrap.network)
        if self.average:
            self.average.follow(self.model, self.optimizer)
        parameters = [value for value in self.wrap.network.parameters() if value.requires_grad]
        window, self.logged = Window(self.accelerator.device), self.step
        waited, checked = time.monotonic(), False
        # Tokens are measured on the CPU first, see `text_length`.
        for batch in self.stream.iterate(self.step, stop, self.accelerator.device, stay=["tokens"]):
            window.waiting += time.monotonic() - waited
            torch.manual_seed(mix(recipe.seed, self.step, self.rank))
            lr = recipe.optim.lr * learning_rate_factor(self.step, recipe.steps, recipe.schedule)
            set_learning_rate(self.optimizer, lr)
            seen = self.train_step(batch, parameters, window)
            if seen and not checked:
                require_gradients(self.wrap.without_gradient())
                checked = True
            if self.average:
                self.average.update(self.step)
            self.step += 1
            self.samples_seen += seen
            leaves = self.stop.agreed and self.step < recipe.steps
            saves = leaves or self.step % recipe.checkpoint.every == 0 or self.step == recipe.steps
            logs = self.step % recipe.log_every == 0 or self.step == recipe.steps
            if saves or logs or self.evaluations.fall_on(self.step):
                self.watch.settle()  # before anything is told or kept of a run that has diverged
            self.saver.poll()
            if logs:
                record = self.log_window(window, batch, lr)
                window, self.logged = Window(self.accelerator.device), self.step
                loss = "none" if record["loss"] is None else f"{record['loss']:.3f}"
                bar.advance(0, note=f"loss {loss}, {record['samples_per_s']:.0f} samples/s")
            bar.advance()
            if not leaves:  # little time is left; a resumed run makes up for it
                self.evaluate()
            if saves:
                self.save()
            if leaves:
                self.leave()
            waited = time.monotonic()
        self.saved = self.wrap.state()
        self.wrap.refresh()
        self.accelerator.free_memory()

    def begin_phase(self) -> Phase:
        """Make the model and the stream what the phase of the current step wants, and return it."""
        phase, resized = self.phases.enter(self.step, self.average)
        # Moments of another grid's positions are of no use.
        self.saved = {key: value for key, value in self.saved.items() if key.split("|")[0] not in resized}
        set_picture_size(self.stream, self.encoder.image_size)
        return phase

    def train_step(self, batch: Batch, parameters: list[nn.Parameter], window: Window) -> int:
        """One optimiser step; returns how many pairs all ranks saw."""
        device = self.accelerator.device
        counts = self.stop.exchange(len(batch["images"]))
        # One pair has nothing to be contrasted with; a rank whose samples were all bad has nothing to forward.
        if sum(counts) < 2 or min(counts) == 0 or self.step + 1 in self.watch.left_out:
            return 0
        model, optimizer = self.wrap.model, self.wrap.stepper
        set_training_mode(model, self.phases.begun(self.step))
        skips = self.recipe.on_divergence.action == "skip"
        statistics = batch_statistics(model, self.means) if skips else []
        inputs = tuple(batch[name].to(device, non_blocking=True) for name in self.inputs)
        self.meter.text_length = length = self.wrap.text_length(batch["tokens"])
        told = (self.step + 1) % self.recipe.log_every == 0 or self.step + 1 == self.recipe.steps
        self.sources.watch(batch.sources, logged=told)
        loss = backward(
            self.wrap,
            inputs,
            lambda features: self.loss_of(features, inputs),
            self.recipe,
            self.accelerator,
            rows=max(counts),
            length=length,
        )
        self.scale.unscale(self.optimizer)
        if told:
            self.meter.take_norms(self.wrap.norm)
        norm = self.wrap.clip(parameters, self.recipe.optim.clip_norm)
        overflows = self.scale.overflows(loss, norm)
        if overflows or not self.watch.accepts(self.step + 1, loss, norm, batch.keys):
            if not overflows:
                self.scale.leave_out()
            optimizer.zero_grad(set_to_none=True)
            self.meter.norms = {}
            for value, before in statistics:
                value.copy_(before)
            return 0
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.wrap.limit_scale(math.log(self.recipe.max_logit_scale))
        window.add(loss.detach(), norm, sum(counts))
        return sum(counts)

    def leave(self) -> None:
        """End a run that was told to, after its save.

        Raises:
            Preempted: Always.
        """
        self.saver.wait()
        self.accelerator.wait_for_everyone()
        self.records.end()
        self.say(
            f"told to leave: saved step {self.step} of {self.recipe.steps} in {self.folder.checkpoints}; "
            "the same command with --resume goes on"
        )
        raise Preempted(self.step, self.recipe.preempted_exit_code)

    def loss_of(self, features: Features, inputs: tuple[Tensor, ...]) -> Tensor:
        """The recipe's loss; in a mixture, steps that are logged also keep each source's share of it."""
        self.sources.take(features)
        return self.objective(features, *inputs)

    def log_window(self, window: Window, batch: Batch, lr: float) -> dict[str, Any]:
        """Write one line of the log about the steps since the last one."""
        loss = window.mean_loss(self.accelerator, self.step, self.watch.advice)
        elapsed = time.monotonic() - window.began
        record = {
            "step": self.step,
            "epoch": batch.epoch,
            "samples_seen": self.samples_seen,
            "loss": loss,
            "lr": lr,
            "samples_per_s": window.samples / elapsed,
            "data_wait_s": window.waiting / max(window.steps, 1),
            "data_wait_share": window.waiting / elapsed,
            "grad_norm": float(window.norm),
            "logit_scale": float(whole(self.wrap.model.logit_scale.detach()).exp()),
            "memory_mb": peak_memory_mb(self.accelerator.device),
            "faults": dict(self.stream.faults),
            **self.meter.record(window.samples / elapsed),
            **self.terms.record(),
            **self.scale.record(),
            **self.sources.record(self.logged, self.step, elapsed),
        }
        self.records.step(record)
        return record

    def evaluate(self, *, every: bool = True) -> None:
        """Run the evaluators that are due, all of them unless `every`."""
        due = self.evaluations.due(self.step, every=every)
        if not due:
            return
        self.wrap.refresh()
        with self.averaged():
            numbers = self.evaluations.run(due, self.encoder, main=self.main)
        if self.main:
            self.evaluations.keep(self.step, numbers)
            self.records.evaluation(self.step, self.samples_seen, numbers)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Begin to write a checkpoint (rank 0, with what the others have of it)."""
        self.saver.wait()
        self.wrap.refresh()
        taken = self.main or self.wrap.engine
        moments = self.wrap.state(copy=self.recipe.checkpoint.background) if taken else {}
        if self.main:
            self.saver.save(
                self.step,
                self.encoder,
                moments,
                card=model_card(self.recipe, self.step, self.samples_seen, self.evaluations.history),
                state={
                    "samples_seen": self.samples_seen,
                    "world_size": self.world,
                    "identity": identity(self.recipe, self.stream.samples),
                    "history": self.evaluations.history,
                    "stream": self.stream.state_dict(),
                    "losses": self.watch.state(),
                    "scale": self.scale.state(),
                },
                average=self.average.state if self.average else None,
                terms=self.beside.state_dict(),
            )

    def averaged(self) -> AbstractContextManager[Any]:
        """The encoder is the average of its weights inside, if the recipe has one."""
        return self.average.in_place() if self.average else nullcontext()

    @property
    def model_folder(self) -> Path:
        """Where the checkpoint of the current step has, or will have, its model."""
        return step_folder(self.folder.checkpoints, self.step) / "model"

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write metrics.json and the report, and say where the model is."""
        if self.average:
            self.average.exchange()  # the encoder that a caller finds is the one that was saved
            self.average = None
        if self.recipe.lora:
            merge_adapters(self.model)
        metrics = {
            "steps": self.step,
            "samples_seen": self.samples_seen,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "pairs": self.stream.samples,
            "seconds": seconds,
            "evaluation": self.evaluations.history.get(str(self.step), {}),
            "faults": dict(self.stream.faults),
            "batches_left_out": len(self.watch.left_out),
            "checkpoint": str(self.model_folder),
        }
        self.folder.write_metrics(metrics)
        if self.main:
            write_report(self.folder, self.recipe, metrics)
        self.records.end()
        self.say(f"the model: {self.model_folder}; the report: {self.folder.path / 'report.html'}")
        return metrics

    def say(self, text: str) -> None:
        """Tell the user, once."""
        if self.main:
            print(text, file=sys.stderr, flush=True)

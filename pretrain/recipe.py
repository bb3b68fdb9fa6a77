"""What a pretraining recipe says; no torch here, so that `--help` and the checks are quick."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pairstream.recipe import Config
from pretrain.recipe_data import Data
from pretrain.recipe_loss import DistillationConfig, InfoNCEConfig, Loss, MultiPositiveConfig, TermsConfig
from pretrain.recipe_model import Model, TowersModel
from pretrain.recipe_optim import WSD, AdamW, Cosine, PretrainOptimizer, Schedule, check_schedule


class Phase(Config):
    """What trains from a step on, and on what pictures. Locked parts run as in evaluation: batch statistics stay,
    dropout is off.
    """

    step: int = Field(default=0, ge=0)
    """Optimiser step at which this begins."""
    image_groups: int | Literal["all"] = "all"
    """How many of the image tower's last layer groups train; 0 leaves only its projection."""
    text_groups: int | Literal["all"] = "all"
    """The same for the text tower."""
    tower_lr: float = Field(default=1.0, gt=0)
    """Learning rate of the towers as a multiple of that of the projections and logit_scale."""
    keep_statistics: bool = True
    """Whether a tower that is or was locked by groups goes on as in evaluation where it trains: its own batch
    statistics, no dropout. Going over to those of the batch makes the loss jump when a pretrained tower is unlocked;
    false suits long training with large batches."""
    image_size: int | None = Field(default=None, ge=8)
    """Side of the square pictures, pixels; None is the model's own. Embeddings of positions are interpolated."""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each picture's patches that a ViT does not see in training (FLIP)."""


class EMA(Config):
    """A running average of the weights, which is evaluated and saved in their place."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """Share of the average that stays each step; it spans about 1 / (1 - decay) steps."""
    ramp: bool = True
    """Whether the share begins at 0.1 and rises to `decay` as (1 + n) / (10 + n), so that random first weights
    are forgotten; false keeps an average that starts from a pretrained model slow."""


class LoRA(Config):
    """Towers whose weights stay and whose matrices get small adapters that train; checkpoints have them added."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """The adapters' product counts alpha / rank times."""
    dora: bool = False
    """Learn the length of each row of a matrix apart from its direction (DoRA)."""
    towers: tuple[Literal["image", "text"], ...] = Field(default=("image", "text"), min_length=1)
    """Those that are adapted; another one trains as the phases say."""


class Checkpoints(Config):
    """When checkpoints are written and how many stay."""

    every: int = Field(default=1000, ge=1)
    """Optimiser steps between two; the last step always writes one."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest stay."""


class PretrainCheckpoints(Checkpoints):
    """Checkpoints of weeks of training: written beside it, and copied to where they outlive the machine."""

    background: bool = True
    """Write files in a thread while training goes on, from a copy in main memory; False waits instead."""
    copy_to: str | None = None
    """Copy each checkpoint to this folder or fsspec URL (s3://BUCKET/RUN, gs://..., hf://...); `--resume` looks there
    when the run folder has none."""
    copy_keep: int | None = Field(default=None, ge=1)
    """How many of the newest copies stay; None leaves all."""

    @model_validator(mode="after")
    def complete(self) -> PretrainCheckpoints:
        if self.copy_keep and not self.copy_to:
            raise ValueError(
                f"copy_keep {self.copy_keep} without copy_to: there is no place to keep copies in"
            )
        return self


class OnDivergence(Config):
    """What becomes of a step whose loss or gradient is not finite, or whose loss spikes.

    Its samples are written to `divergence.jsonl` in any case.
    """

    action: Literal["stop", "skip", "rollback"] = "stop"
    """`stop` ends the run with an error and keeps the last good checkpoint; `skip` leaves the step out (it waits for
    the device once a step); `rollback` goes back to the last checkpoint and leaves that batch out."""
    spike: float | None = Field(default=None, gt=1)
    """A loss above this multiple of the median of the last `window` steps counts as well; None: only what is not
    finite does."""
    window: int = Field(default=100, ge=1)
    """Steps of the median; before so many there are no spikes."""
    limit: int = Field(default=10, ge=1)
    """Batches that may be left out; the run stops at the next."""


class Evaluation(Config):
    """An evaluator that runs every so many steps, named by its import string."""

    use: str
    """`module:Class`; the class has `run(encoder) -> dict[str, float]`."""
    every: int = Field(default=500, ge=1)
    """Optimiser steps; the last step always evaluates."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""

    @field_validator("use")
    @classmethod
    def is_import_string(cls, value: str) -> str:
        if value.count(":") != 1:
            raise ValueError("expected an import string such as 'retrieval.evaluator:RetrievalEvaluator'")
        return value


class PretrainRecipe(Config):
    """All of a pretraining run."""

    run: str
    """The run folder, such as `runs/scenes_cpu`."""
    model: Model = TowersModel()
    data: Data
    batch_size: int = Field(default=256, ge=2)
    """Pairs in a step, over all ranks together; each is contrasted with all others."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Pairs that a rank holds activations of at a time (GradCache); None holds those of its whole batch."""
    loss: Loss = InfoNCEConfig()
    terms: TermsConfig | None = None
    """What is added to the loss, each with its weight; None adds nothing."""
    steps: int = Field(ge=1)
    """Optimiser steps."""
    optim: PretrainOptimizer = AdamW()
    schedule: Schedule = Cosine()
    ema: EMA | None = None
    """Evaluate and save a running average of the weights; None takes the weights themselves."""
    lora: LoRA | None = None
    """Train adapters of the towers in place of their weights; None trains the weights."""
    phases: tuple[Phase, ...] = ()
    """In the order of their steps; none trains everything throughout."""
    max_logit_scale: float = Field(default=100.0, gt=0)
    """logit_scale (exponentiated) is clamped to at most this after each step."""
    processes: int | None = Field(default=None, ge=1)
    """Refuse to train on another number of processes; launchers may start fewer than asked for."""
    rank_timeout: float | None = Field(default=None, gt=0)
    """Seconds that processes wait for one another before the run ends with an error; None: torch's own, 1800 on CPU and
    600 on GPUs. An evaluation, for which the others wait, must fit in."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """`auto` takes bf16 on a GPU that has it and fp32 elsewhere. fp16 is for GPUs before bf16; it scales the loss and
    leaves steps out while it looks for the scale. fp8 needs an Ada or Hopper GPU, or later, and torchao."""
    compile: bool = False
    """Compile the towers' forward and backward pass (torch.compile): a wait of minutes before the first step of each
    phase, faster ones after it. Dropout draws other numbers than without."""
    checkpoint_activations: bool = False
    """Keep only the inputs of each tower's blocks for the backward pass, which runs them again: far less memory for
    about 4/3 of the time, with the same gradients."""
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=20, ge=1)
    """Optimiser steps between lines of log.jsonl."""
    checkpoint: PretrainCheckpoints = PretrainCheckpoints()
    on_divergence: OnDivergence = OnDivergence()
    preempted_exit_code: int = Field(default=0, ge=0, le=255)
    """Exit code of a run that SIGTERM or SIGUSR1 told to leave, after its save. 0 does not alarm a scheduler that
    starts jobs again by itself (SLURM's --requeue); Kubernetes takes 0 for finished, and wants another, such as 75."""
    evaluate: tuple[Evaluation, ...] = ()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Accelerate's trackers that get the log as well."""

    @model_validator(mode="before")
    @classmethod
    def renamed(cls, content: Any) -> Any:
        if isinstance(content, dict) and "locks" in content:
            raise ValueError("the key locks is called phases now, with the same keys in it")
        return content

    @model_validator(mode="after")
    def possible(self) -> PretrainRecipe:
        check_schedule(self.schedule, self.steps)
        self.check_phases()
        if self.compile and self.checkpoint_activations:
            raise ValueError(
                "compile chooses by itself what is recomputed in the backward pass: leave compile or "
                "checkpoint_activations out"
            )
        if self.lora and self.ema:
            raise ValueError("ema averages weights and lora locks them: leave one of them out")
        if self.optim.kind == "schedule_free":
            self.check_schedule_free()
        if self.views and self.data.scaled_decode:
            raise ValueError(
                "terms.self_supervision takes views of the whole picture, data.scaled_decode decodes it for one crop: "
                "leave scaled_decode out"
            )
        if self.data.captions_per_image > 1 and not (
            self.data.captions == "random" and isinstance(self.loss, MultiPositiveConfig)
        ):
            raise ValueError(
                f"data.captions_per_image {self.data.captions_per_image} needs data.captions: random and "
                f"loss: {{kind: multi_positive}}, got {self.data.captions} and {self.loss.kind}"
            )
        return self

    def check_schedule_free(self) -> None:
        """Refuse what would average a second time, or weights that are no longer those that trained."""
        if not (isinstance(self.schedule, WSD) and self.schedule.decay == 0):
            raise ValueError(
                f"optim.kind schedule_free wants a rate that stays: schedule: {{kind: wsd, decay: 0}}, got "
                f"{self.schedule.kind}{' with a decay' if isinstance(self.schedule, WSD) else ''}"
            )
        if self.ema or self.lora or len(self.phases) > 1:
            raise ValueError(
                "optim.kind schedule_free averages the same weights from the first step to the last: leave out ema, "
                "lora and all phases but the first, or take another optimiser"
            )

    @property
    def views(self) -> int:
        """Further views of each picture that a step takes."""
        return 2 if self.terms and self.terms.self_supervision else 0

    def check_phases(self) -> None:
        """Refuse phases out of order, and those with keys that would do nothing."""
        starts = [phase.step for phase in self.phases]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(f"phases must begin at step 0 and go upwards, got steps {starts}")
        counted = False
        for number, phase in enumerate(self.phases):
            counted = counted or phase.image_groups != "all"
            if phase.patch_dropout and (phase.image_groups == 0 or (counted and phase.keep_statistics)):
                raise ValueError(
                    f"phases.{number}.patch_dropout: the image tower is or was locked by groups and runs as in "
                    "evaluation, where no patch is left out; with groups that train, set keep_statistics: false"
                )
            if phase.image_size and isinstance(self.loss, DistillationConfig) and self.loss.teachers:
                raise ValueError(
                    f"phases.{number}.image_size: teachers see the student's pictures, and theirs have one size; "
                    "leave image_size out, take stored teachers (loss.stored) or another loss"
                )

"""What a pretraining recipe says; no torch here, so that `--help` and the checks are quick."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pairstream.recipe import Config


class ViT(Config):
    """A vision transformer of open_clip's, by its sizes."""

    kind: Literal["vit"] = "vit"
    image_size: int = Field(default=64, ge=8)
    """Side of the square input, pixels."""
    patch_size: int = Field(default=8, ge=1)
    """Side of a patch, pixels."""
    width: int = Field(default=192, ge=8)
    layers: int = Field(default=6, ge=1)
    head_width: int = Field(default=64, ge=1)
    mlp_ratio: float = 4.0
    pool: Literal["tok", "avg"] = "tok"

    @model_validator(mode="after")
    def fits(self) -> ViT:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is not a multiple of head_width {self.head_width}")
        return self

    def vision_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "width": self.width,
            "layers": self.layers,
            "head_width": self.head_width,
            "mlp_ratio": self.mlp_ratio,
            "pool_type": self.pool,
        }


class ResNet(Config):
    """CLIP's modified ResNet (three-convolution stem, anti-aliased strides, attention pooling)."""

    kind: Literal["resnet"] = "resnet"
    image_size: int = Field(default=64, ge=32)
    """Side of the square input, pixels; a multiple of 32."""
    width: int = Field(default=32, ge=8)
    """Channels of the stem; the last stage has 32 times as many."""
    layers: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Bottleneck blocks in each stage; ResNet-50 has (3, 4, 6, 3)."""

    @model_validator(mode="after")
    def fits(self) -> ResNet:
        if self.image_size % 32:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 32")
        return self

    def vision_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {"image_size": self.image_size, "width": self.width, "layers": list(self.layers)}


class TimmTower(Config):
    """Any image model of timm's, with a projection on its pooled features."""

    kind: Literal["timm"] = "timm"
    name: str
    """The name timm knows, such as `tf_efficientnet_lite0`."""
    image_size: int = Field(default=224, ge=8)
    projection: Literal["linear", "mlp"] = "linear"
    weights: str | None = None
    """Start from this state dict: a .safetensors or .pth file, or `package:NAME/path/in/it`."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def vision_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {
            "timm_model_name": self.name,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": self.projection,
            "image_size": self.image_size,
        }


class TextTransformer(Config):
    """CLIP's causal text transformer over its byte-pair vocabulary."""

    kind: Literal["transformer"] = "transformer"
    context_length: int = Field(default=77, ge=4)
    """Tokens, start and end included."""
    width: int = Field(default=256, ge=8)
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def fits(self) -> TextTransformer:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def text_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {
            "context_length": self.context_length,
            "vocab_size": 49408,
            "width": self.width,
            "heads": self.heads,
            "layers": self.layers,
        }


class TransformersText(Config):
    """A text encoder of transformers' (BERT, RoBERTa, ...) with its own tokenizer and weights."""

    kind: Literal["transformers"] = "transformers"
    name: str
    """A hub name, a folder, or `package:NAME/path/in/it`."""
    context_length: int = Field(default=77, ge=4)
    projection: Literal["linear", "mlp"] = "linear"
    pooler: Literal["mean_pooler", "cls_pooler", "max_pooler"] = "mean_pooler"

    def text_cfg(self) -> dict[str, Any]:
        """The tower in open_clip's words."""
        return {
            "hf_model_name": self.name,
            "hf_tokenizer_name": self.name,
            "hf_proj_type": self.projection,
            "hf_pooler_type": self.pooler,
            "context_length": self.context_length,
        }


ImageTower = Annotated[ViT | ResNet | TimmTower, Field(discriminator="kind")]
TextTower = Annotated[TextTransformer | TransformersText, Field(discriminator="kind")]


class TowersModel(Config):
    """A dual encoder from two towers given by their sizes."""

    kind: Literal["towers"] = "towers"
    embed_dim: int = Field(default=256, ge=2)
    image_tower: ImageTower = ViT()
    text_tower: TextTower = TextTransformer()


class OpenClipModel(Config):
    """A dual encoder by the name open_clip knows, or one of our checkpoints."""

    kind: Literal["open_clip"] = "open_clip"
    name: str
    """`ViT-B-32`, `hf-hub:ORG/REPO`, `local-dir:PATH`, or the path of a checkpoint or run folder."""
    pretrained: str | None = None
    """A tag of open_clip's, such as `laion2b_s34b_b79k`; None starts from random weights."""


Model = Annotated[TowersModel | OpenClipModel, Field(discriminator="kind")]


class DataSource(Config):
    """Some shards of a mixture."""

    shards: str | tuple[str, ...]
    """A folder, glob, braces, URL or `pipe:` command; or several."""
    name: str = ""
    """What the log calls it; the first of its shards' names when empty."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the samples relative to the other sources' weights; give it to all sources or to none."""
    replacement: bool = False
    """Draw its shards with replacement rather than each once per epoch."""
    captions: Literal["random", "first", "longest"] | None = None
    """Which caption of an image with several a step takes; None as `data.captions`."""
    rewritten_key: str | None = None
    """JSON key of captions that a model wrote anew: a text or a list of texts."""
    rewritten_share: float | None = Field(default=None, gt=0, le=1)
    """How often a step takes a rewritten caption in place of the image's own."""

    @model_validator(mode="after")
    def complete(self) -> DataSource:
        if (self.rewritten_key is None) != (self.rewritten_share is None):
            raise ValueError("rewritten captions need both rewritten_key and rewritten_share")
        return self


def train_kind(value: Any) -> str:
    """Which of the ways to name training data this is."""
    if isinstance(value, list | tuple) and not all(isinstance(word, str) for word in value):
        return "sources"
    return "shards" if isinstance(value, list | tuple) else "one"


Train = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[tuple[str, ...], Tag("shards")]
    | Annotated[tuple[DataSource, ...], Tag("sources")],
    Discriminator(train_kind),
]


class Data(Config):
    """The training pairs and how they are read."""

    train: Train
    """Shards: a folder, glob, braces, URL or `pipe:` command; or several; or a list of sources to be mixed."""
    temperature: float | None = Field(default=None, gt=0)
    """Of sources without weights: these are samples ** (1 / temperature). 1 goes by size, a large one is even."""
    mix: Literal["samples", "batches"] = "samples"
    """`samples`: each batch holds its exact share of each source; `batches`: each batch is of one source."""
    cache_dir: str | None = None
    """Where shards from elsewhere are kept; ~/.cache/pairstream/shards when None."""
    cache_gb: float | None = Field(default=None, gt=0)
    """Most that they may take, in 10^9 bytes; the least recently used make room. None has no limit."""
    workers: int = Field(default=2, ge=0)
    """Loader processes of each rank; 0 loads in the training process."""
    shuffle: int = Field(default=10000, ge=0)
    """References in the shuffle buffer, samples; 0 keeps the order of the shards."""
    captions: Literal["random", "first", "longest"] = "random"
    """Which caption of an image with several a step takes."""
    captions_per_image: int = Field(default=1, ge=1)
    """How many captions of an image a step takes; more than one want `loss: {kind: multi_positive}`."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the area that the random crop keeps, least and most."""
    hflip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring; captions that say left or right forbid it."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Strength of random brightness, contrast and saturation."""
    word_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each caption's words that is left out at random; holds back learning small sets by heart."""
    scaled_decode: bool = False
    """Decode large JPEGs at half, quarter or eighth size where the crop stays as large as the model's input:
    1.7 times as fast at 1024 px, 1.3 at 512; pixels differ by up to 2.5 of 255 on average."""
    max_faults: float = Field(default=0.01, ge=0, le=1)
    """Share of bad samples past which the run stops."""

    @field_validator("train")
    @classmethod
    def not_empty(cls, value: Any) -> Any:
        if not value:
            raise ValueError("the shard list is empty: give a folder, glob or URL of .tar shards")
        return value

    @property
    def names(self) -> str:
        """What `train` means, in few words."""
        words = (self.train,) if isinstance(self.train, str) else self.train
        return ", ".join(word if isinstance(word, str) else word.name or str(word.shards) for word in words)


class InfoNCEConfig(Config):
    """CLIP's loss: each image finds its text among all of the batch, and each text its image."""

    kind: Literal["info_nce"] = "info_nce"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over the batch."""
    tile: int | None = Field(default=None, ge=1)
    """Side of a block of logits; None chooses."""
    exchange: Literal["gather", "ring"] = "gather"
    """How texts reach all ranks: all at once, or passed on so that memory does not grow with the ranks."""


class SigmoidConfig(Config):
    """SigLIP's loss: each combination of image and text is a yes-or-no question."""

    kind: Literal["sigmoid"] = "sigmoid"
    init_scale: float = Field(default=10.0, gt=0)
    """First logit scale (exponentiated) of a model without a logit_bias; one that has it keeps its own."""
    init_bias: float = -10.0
    """First logit_bias of such a model."""
    tile: int | None = Field(default=None, ge=1)
    """Side of a block of logits; None chooses."""
    exchange: Literal["gather", "ring"] = "ring"


class MultiPositiveConfig(Config):
    """InfoNCE in which all captions of an image, and captions that are equal, are positives."""

    kind: Literal["multi_positive"] = "multi_positive"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over the batch."""


class HardNegativesConfig(Config):
    """InfoNCE in which negatives count the more, the more they look like the positive."""

    kind: Literal["hard_negatives"] = "hard_negatives"
    beta: float = Field(default=0.2, ge=0)
    """Sharpness of the weights; 0 is InfoNCE."""


class DistillationConfig(Config):
    """InfoNCE and agreement with the softmax of teachers over the same batch."""

    kind: Literal["distillation"] = "distillation"
    teachers: tuple[str, ...] = Field(min_length=1)
    """Checkpoints, run folders or names of open_clip's with the student's image size and tokenizer."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the agreement; the rest is InfoNCE."""


Loss = Annotated[
    InfoNCEConfig | SigmoidConfig | MultiPositiveConfig | HardNegativesConfig | DistillationConfig,
    Field(discriminator="kind"),
]


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


class OptimizerConfig(Config):
    """What every optimiser has. Gains, biases and logit_scale do not decay."""

    lr: float = Field(default=5e-4, gt=0)
    """At its peak."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Decoupled: a step takes lr x this share of a weight away."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; None leaves gradients as they are."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each layer group of a tower as a multiple of that of the next one towards the output; 0.65
    to 0.9 suit pretrained towers."""


class AdamW(OptimizerConfig):
    """AdamW without decay on gains, biases and logit_scale."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)


class MuonConfig(AdamW):
    """Muon for the weights of linear and convolution layers, AdamW with the same `lr` for everything else.

    Learns more from each sample at more time a step; see `pretrain.muon`.
    """

    kind: Literal["muon"] = "muon"  # pyright: ignore[reportIncompatibleVariableOverride]
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Share of the earlier gradients in Muon's direction."""


class LionConfig(OptimizerConfig):
    """Lion: the sign of a momentum, of which it keeps one a weight where AdamW keeps two.

    Its steps are larger, so the rate is a third to a tenth of AdamW's and the decay as much larger.
    """

    kind: Literal["lion"] = "lion"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=1.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    """Share of the momentum in a step's direction, and of its past in the momentum."""


class AdafactorConfig(OptimizerConfig):
    """Adafactor as big_vision trains SigLIP with: second moments by row and column, the first in bfloat16.

    Takes a quarter of AdamW's memory at the same rate and decay.
    """

    kind: Literal["adafactor"] = "adafactor"
    momentum: float | None = Field(default=0.9, ge=0, lt=1)
    """Share of the past in a step's direction; None keeps none, and no memory for it."""
    decay_rate: float = Field(default=0.8, gt=0, lt=1)
    """Second moments forget as 1 - t ** -decay_rate, up to `beta2_cap`."""
    beta2_cap: float = Field(default=0.999, gt=0, lt=1)


def kind_or(default: str) -> Discriminator:
    """Tells the alternatives of a union by `kind`; a configuration that names none is of the default one."""

    def kind_of(value: Any) -> str:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)

    return Discriminator(kind_of)


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[LionConfig, Tag("lion")]
    | Annotated[AdafactorConfig, Tag("adafactor")],
    kind_or("adamw"),
]


class Warmup(Config):
    """What every schedule begins with."""

    warmup: int = Field(default=500, ge=0)
    """Optimiser steps over which the rate rises linearly to its peak."""


class Cosine(Warmup):
    """Linear warm-up, then a cosine down to `final` times the peak."""

    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.0, ge=0, le=1)


class WSD(Warmup):
    """Warm-up, a stable rate, and a decay at the end: a run can be made longer from any checkpoint before the decay."""

    kind: Literal["wsd"] = "wsd"
    decay: int = Field(default=500, ge=0)
    """The last steps, over which the rate falls to `final` times the peak; a tenth to a fifth of the run."""
    final: float = Field(default=0.0, ge=0, le=1)
    shape: Literal["sqrt", "linear"] = "sqrt"
    """Of the fall: 1 - sqrt of the part of it that is done, or straight."""


class Rsqrt(Warmup):
    """Warm-up, then peak / sqrt(1 + (step - warmup) / timescale): needs no end; the last steps fall to zero."""

    kind: Literal["rsqrt"] = "rsqrt"
    timescale: int = Field(default=10_000, ge=1)
    """Steps after the warm-up at which the rate is the peak / sqrt(2)."""
    cooldown: int = Field(default=0, ge=0)
    """The last steps, over which the rate goes down to zero on a straight line."""


Schedule = Annotated[
    Annotated[Cosine, Tag("cosine")] | Annotated[WSD, Tag("wsd")] | Annotated[Rsqrt, Tag("rsqrt")],
    kind_or("cosine"),
]


def check_schedule(schedule: Cosine | WSD | Rsqrt, steps: int) -> None:
    """Refuse a schedule that does not fit into a run.

    Raises:
        ValueError: Its parts are as long as the run or longer.
    """
    if schedule.warmup >= steps:
        raise ValueError(
            f"schedule.warmup ({schedule.warmup}) must be below steps ({steps}): "
            "the learning rate would never reach its peak"
        )
    name = {"wsd": "decay", "rsqrt": "cooldown"}.get(schedule.kind)
    length = getattr(schedule, name) if name else 0
    if schedule.warmup + length > steps:
        raise ValueError(
            f"schedule.warmup ({schedule.warmup}) and schedule.{name} ({length}) are longer than the run "
            f"({steps} steps)"
        )


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
    steps: int = Field(ge=1)
    """Optimiser steps."""
    optim: Optimizer = AdamW()
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
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes bf16 on a GPU that has it and fp32 elsewhere."""
    seed: int = 0
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
        if self.lora and self.ema:
            raise ValueError("ema averages weights and lora locks them: leave one of them out")
        if self.data.captions_per_image > 1 and not (
            self.data.captions == "random" and isinstance(self.loss, MultiPositiveConfig)
        ):
            raise ValueError(
                f"data.captions_per_image {self.data.captions_per_image} needs data.captions: random and "
                f"loss: {{kind: multi_positive}}, got {self.data.captions} and {self.loss.kind}"
            )
        return self

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
            if phase.image_size and isinstance(self.loss, DistillationConfig):
                raise ValueError(
                    f"phases.{number}.image_size: teachers see the student's pictures, and theirs have one size; "
                    "leave image_size out or take another loss"
                )

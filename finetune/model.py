"""The vision-language model: an image tower's tokens, projected, are the prefix of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.connectors import build_connector, token_grid
from finetune.drawing import luck
from finetune.language_models import no_bars
from finetune.learning import Learns
from finetune.lora import add_lora, has_lora, load_adapter, save_adapter, without_adapters
from finetune.recipe import FinetuneRecipe
from finetune.recipe_model import Connector, Lora
from finetune.recipe_task import CaptionTask, Decoding, MixedTask, Task, VqaTask
from finetune.saved import TaskModel, finite, opened
from finetune.text import make_pair, token_ids
from finetune.tower_adapters import train_adapters_alone
from finetune.writing import Continues, Picture
from pretrain.checkpoint import save_tensors
from pretrain.encoder import Encoder, load_encoder


class VisionLanguageModel(Learns, Continues, TaskModel):
    """Writes captions or answers, given a picture and a prompt.

    The sequence is `[image tokens][prompt][answer][end]`. Each picture is encoded once, however many texts there are
    to it. The image tower always stays in evaluation mode (batch statistics and dropout as after pretraining), also
    when its weights train.

    Args:
        encoder: The dual encoder whose image tower sees.
        connector: Its configuration.
        language_model: A causal language model of transformers'.
        tokenizer: The language model's, with an end and a padding token.
        task: What the model is for.
        decoding: How text is written when nothing else is said.
        freeze_image_tower: Compute no gradient for the image tower.
        freeze_language_model: The same for the language model.
        lora: Adapters of the language model, which train instead of it; those that it has already are kept.

    Raises:
        ValueError: The connector does not fit the tokens, or the image alone fills the context.

    Example:
        >>> model = load_task_model("runs/scenes_caption")                         # doctest: +SKIP
        >>> model.caption([Image.open("cat.jpg")])                                 # doctest: +SKIP
        ['a cat next to two red hearts']
    """

    def __init__(
        self,
        encoder: Encoder,
        connector: Connector,
        language_model: Any,
        tokenizer: Any,
        task: Task,
        decoding: Decoding,
        *,
        freeze_image_tower: bool = True,
        freeze_language_model: bool = False,
        lora: Lora | None = None,
    ):
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.task, self.decoding, self.connector_config = task, decoding, connector
        self.freeze_image_tower = freeze_image_tower
        self.length_groups = 1
        self.image_tower = encoder.model.visual
        self.language_model = language_model.to(encoder.device)
        with torch.no_grad():
            blank = torch.zeros(1, 3, *encoder.image_size, dtype=torch.uint8)
            count = encoder.image_tokens(blank).shape[1]
        self.connector = build_connector(
            connector,
            grid=token_grid(count, encoder.image_size),
            token_dim=encoder.token_dim,
            width=language_model.get_input_embeddings().embedding_dim,
            language_model=language_model,
        ).to(encoder.device)
        self.image_tower.requires_grad_(not freeze_image_tower)
        train_adapters_alone(self.image_tower)
        self.lora = lora if lora is not None and lora.rank else None
        for (
            parameter
        ) in self.language_model.parameters():  # those of few bits are whole numbers and cannot train
            parameter.requires_grad_(parameter.is_floating_point() and not freeze_language_model)
        if self.lora is not None:
            if not has_lora(self.language_model):
                add_lora(self.language_model, self.lora)
            for name, parameter in self.language_model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        if not freeze_image_tower:
            self.freeze_unused(blank)
        if self.prefix_length >= self.context:
            raise ValueError(
                f"the picture alone takes {self.prefix_length} positions of the language model's {self.context}: "
                "raise connector.merge, or language_model.context"
            )

    @property
    def caption_task(self) -> CaptionTask | None:
        """How captions are asked for; None when the model writes none."""
        if isinstance(self.task, MixedTask):
            return self.task.caption
        return self.task if isinstance(self.task, CaptionTask) else None

    @property
    def vqa_task(self) -> VqaTask | None:
        """How questions are asked; None when the model answers none."""
        if isinstance(self.task, MixedTask):
            return self.task.vqa
        return self.task if isinstance(self.task, VqaTask) else None

    @property
    def prefix_length(self) -> int:
        """Positions that a picture takes in the language model."""
        return int(self.connector.length)  # pyright: ignore

    @property
    def context(self) -> int:
        """Positions that the language model has."""
        return int(getattr(self.language_model.config, "max_position_embeddings", None) or 1 << 30)

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def freeze_unused(self, blank: Tensor) -> None:
        """Freeze what the tokens do not depend on (pooling, projection): it is not said to train and then does not."""
        self.encoder.image_tokens(blank).sum().backward()
        for parameter in self.image_tower.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Training mode for connector and language model; the image tower stays in evaluation mode."""
        super().train(mode)
        self.image_tower.eval()
        return self

    def image_tokens(self, images: Tensor) -> Tensor:
        """uint8 `(b, 3, h, w)` to the image tower's tokens `(b, n, token_dim)`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_image_tower):
            return self.encoder.image_tokens(images)

    def caption(
        self,
        images: Sequence[Picture],
        decoding: Decoding | None = None,
        *,
        examples: Sequence[tuple[Picture, str]] = (),
        names: Sequence[str] | None = None,
    ) -> list[str]:
        """Write a caption for each picture.

        Args:
            images: PIL images, file contents, or uint8 `(3, H, W)`.
            decoding: How; the model's own when None.
            examples: Pictures with their captions, to stand in front of each (few-shot prompts).
            names: What to call each picture; where tokens are drawn, they follow this name and `decoding.seed` alone.

        Returns:
            One text a picture.

        Raises:
            ValueError: The model was made for questions.
            data.faults.Fault: File contents that are no picture.
        """
        if self.caption_task is None:
            raise ValueError(f"this model was trained for {self.task.kind}: use answer(images, questions)")
        if len(images) == 0:
            return []
        prompt = self.caption_task.prompt
        shown = [(picture, make_pair(self.tokenizer, prompt, text)) for picture, text in examples]
        return self.write_after(
            shown, images, [prompt] * len(images), decoding, seeds=self.seeds(names, decoding)
        )

    def answer(
        self,
        images: Sequence[Picture],
        questions: Sequence[str],
        decoding: Decoding | None = None,
        *,
        examples: Sequence[tuple[Picture, str, str]] = (),
        names: Sequence[str] | None = None,
    ) -> list[str]:
        """Answer one question about each picture.

        Args:
            images: PIL images, file contents, or uint8 `(3, H, W)`.
            questions: As many.
            decoding: How; the model's own when None.
            examples: Pictures with a question and its answer, to stand in front of each (few-shot prompts).
            names: What to call each question; see `caption`.

        Returns:
            One answer a question.

        Raises:
            ValueError: Numbers differ, an empty question, one that does not fit the context, or a model made for
                captions.
            data.faults.Fault: File contents that are no picture.
        """
        if isinstance(questions, str) or len(images) != len(questions):
            raise ValueError(
                f"got {len(images)} pictures and {questions!r}: expected one question for each picture"
            )
        if len(images) == 0:
            return []
        prompts = [self.prompt(question) for question in questions]
        shown = [
            (picture, make_pair(self.tokenizer, self.prompt(question), answer))
            for picture, question, answer in examples
        ]
        return self.write_after(shown, images, prompts, decoding, seeds=self.seeds(names, decoding))

    def answer_each(
        self, images: Sequence[Picture] | Tensor, questions: Sequence[str], image_of_question: Sequence[int]
    ) -> list[str]:
        """Answer any number of questions about each picture, which is encoded once.

        Args:
            images: As for `see`.
            questions: Any number.
            image_of_question: Each question's picture.

        Raises:
            ValueError: As for `answer`.
        """
        prompts = [self.prompt(question) for question in questions]
        return self.write(self.see(images), image_of_question, prompts)

    def seeds(self, names: Sequence[str] | None, decoding: Decoding | None) -> list[int] | None:
        """The seeds of drawing texts of these names; None where they are not named."""
        seed = (decoding or self.decoding).seed or 0
        return None if names is None else [luck(seed, name) for name in names]

    def prompt(self, question: str) -> str:
        """The prompt that asks a question."""
        if self.vqa_task is None:
            raise ValueError("this model was trained for captions: use caption(images)")
        if not question.strip():
            raise ValueError("an empty question cannot be answered: expected some words")
        return self.vqa_task.prompt.format(question=question.strip())

    def check_question(self, question: str) -> None:
        """Refuse a question that does not fit the context; see `check_room`."""
        self.check_room([[0, token_ids(self.tokenizer, self.prompt(question))]], self.decoding)

    @torch.no_grad()
    def see(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """Pictures to what the language model sees of them: float `(b, p, width)`, for `write`.

        Args:
            images: PIL images, file contents, uint8 `(3, H, W)`; or uint8 `(b, 3, h, w)` of the model's size.

        Raises:
            ValueError: The model's weights make numbers of it that are not finite.
        """
        if not (isinstance(images, Tensor) and images.shape[-2:] == self.encoder.image_size):
            images = torch.stack([self.encoder.preprocess(image) for image in images])
        return finite(self.connector(self.image_tokens(images)))

    def write_parts(self, folder: Path) -> dict[str, Any]:
        """Connector, language model and tokenizer."""
        state = {
            name: value.detach().cpu().contiguous() for name, value in self.connector.state_dict().items()
        }
        save_tensors(state, folder / "connector.safetensors")
        with no_bars(), nullcontext() if self.lora is None else without_adapters(self.language_model):
            self.language_model.save_pretrained(folder / "language_model")
        if self.lora is not None:
            save_adapter(self.language_model, folder)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        return {
            "task": self.task.model_dump(),
            "decoding": self.decoding.model_dump(),
            "connector": self.connector_config.model_dump(),
            **({} if self.lora is None else {"lora": self.lora.model_dump()}),
        }


def build_task_model(
    recipe: FinetuneRecipe, encoder: Encoder, language_model: Any, tokenizer: Any
) -> VisionLanguageModel:
    """Join the parts as a recipe says."""
    decoding = recipe.decoding
    if decoding.sample and decoding.seed is None:
        decoding = decoding.model_copy(update={"seed": recipe.seed})
    model = VisionLanguageModel(
        encoder,
        recipe.connector,
        language_model,
        tokenizer,
        recipe.task,
        decoding,
        freeze_image_tower=recipe.freeze_image_tower,
        freeze_language_model=getattr(recipe.language_model, "freeze", False),
        lora=recipe.lora,
    )
    model.length_groups = recipe.length_groups
    return model


def load_task_model(folder: str | Path, *, device: str = "auto") -> VisionLanguageModel:
    """Open a saved captioner or VQA model; nothing is downloaded.

    Args:
        folder: What `TaskModel.save` wrote, or a run folder of `pairstream finetune`.
        device: A torch device, or `auto`.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: No task model is there.
        ValueError: A part is damaged or of another version.
    """
    with opened(folder) as (place, content):
        connector = TypeAdapter(Connector).validate_python(content["connector"])
        task = TypeAdapter(Task).validate_python(content["task"])
        decoding = Decoding(**content["decoding"])
        tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer", local_files_only=True)
        with no_bars():
            language_model = AutoModelForCausalLM.from_pretrained(
                place / "language_model", local_files_only=True
            )
        state = load_file(place / "connector.safetensors")
        lora = Lora(**content["lora"]) if "lora" in content else None
        if lora is not None:
            load_adapter(add_lora(language_model, lora), place)
    encoder = load_encoder(place / "encoder", device=device)
    model = VisionLanguageModel(encoder, connector, language_model, tokenizer, task, decoding, lora=lora)
    try:
        model.connector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{place}: the connector does not fit the encoder and the language model beside it, so one of them is from "
            f"another model: {error}"
        ) from error
    model.parts = content.get("parts", {})
    return model.eval()

"""The models and the index that one server holds, each with its identity."""

from __future__ import annotations

import atexit
import gc
import hashlib
from dataclasses import dataclass
from pathlib import Path

from finetune.fusion.model import FusionClassifier
from finetune.fusion.saved import load_classifier
from finetune.model import VisionLanguageModel, load_task_model
from finetune.opening import AnswerModel, open_answer_model
from finetune.saved import task_folder
from pretrain.encoder import Encoder, load_encoder
from retrieval.artifact import MANIFEST, sha256
from retrieval.index import Index
from serve.folding import fold
from serve.gallery import Gallery, PictureRows, alive
from serve.schemas import ClassifierIdentity, EncoderIdentity, IndexIdentity, ModelIdentity


@dataclass(frozen=True)
class Models:
    """What is served.

    Attributes:
        encoder: Embeds, classifies, asks the index.
        identity: Its name and hash.
        captioner: Writes captions, with its identity.
        vqa: Answers questions, with its identity.
        index: Is searched, with its identity.
        picture_rows: From the key of a text that was found to the row of its picture.
        gallery: The index's pictures.
        classifier: Labels posts, with its identity.
    """

    encoder: Encoder
    identity: EncoderIdentity
    captioner: tuple[VisionLanguageModel, ModelIdentity] | None = None
    vqa: tuple[AnswerModel, ModelIdentity] | None = None
    index: tuple[Index, IndexIdentity] | None = None
    picture_rows: PictureRows | None = None
    gallery: Gallery | None = None
    classifier: tuple[FusionClassifier, ClassifierIdentity] | None = None


def load_models(
    model: str | Path,
    *,
    captioner: str | Path | None = None,
    vqa: str | Path | None = None,
    classifier: str | Path | None = None,
    index: str | Path | None = None,
    data: tuple[str, ...] = (),
    pretrained: str | None = None,
    device: str = "auto",
) -> Models:
    """Load everything and check that it belongs together.

    Args:
        model: A dual encoder, as `load_encoder` takes it.
        captioner: A folder that `load_task_model` opens.
        vqa: A folder of one that answers questions, by writing or from a list.
        classifier: A folder that `load_classifier` opens.
        index: A folder that `retrieval index` wrote.
        data: The shards that were indexed; only to show their pictures.
        pretrained: open_clip's tag of weights, for a name.
        device: A torch device, or `auto`.

    Returns:
        The models.

    Raises:
        FileNotFoundError: A folder is not there.
        ValueError: A damaged part, an index of another model, a captioner that answers questions or the reverse,
            shards that are not those of the index.
    """
    encoder = load_encoder(model, pretrained=pretrained, device=device)
    identity = EncoderIdentity(name=short_name(model), fingerprint=encoder.fingerprint, dim=encoder.embed_dim)
    found, gallery = None, None
    if index is not None:
        loaded = Index.load(index)
        loaded.check_model(identity.fingerprint, encoder.name)
        found = (
            loaded,
            IndexIdentity(
                name=short_name(index),
                fingerprint=sha256(Path(index) / MANIFEST)[:16],
                images=alive(loaded.images),
                texts=alive(loaded.texts),
            ),
        )
    fold(encoder)  # rows stay what they were; the fingerprint was asked for above
    if data:
        if found is None:
            raise ValueError("--data shows the pictures of an index: give --index, too")
        if found[0].images is None:
            raise ValueError("--data shows the pictures of an index, and this index has texts alone")
        gallery = Gallery(data, found[0].images)
    return Models(
        encoder,
        identity,
        captioner=None if captioner is None else caption_model(captioner, device=device),
        vqa=None if vqa is None else answer_model(vqa, device=device),
        index=found,
        picture_rows=None if found is None else PictureRows(found[0].images),
        gallery=gallery,
        classifier=None if classifier is None else post_model(classifier, device=device),
    )


def settle() -> None:
    """Take all that is loaded out of the garbage collector's rounds; for a process that only serves from now on.

    A full round over torch's and the models' half a million objects holds up every request for 0.3 seconds, and
    finds nothing in them.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # the end of the process may clear them away


def caption_model(folder: str | Path, *, device: str = "auto") -> tuple[VisionLanguageModel, ModelIdentity]:
    """A captioner with its identity.

    Raises:
        FileNotFoundError: None is there.
        ValueError: A model of another task, or damaged.
    """
    model = load_task_model(folder, device=device)
    if model.caption_task is None:
        raise ValueError(
            f"--captioner {folder}: expected a model trained for caption, it is for {model.task.kind}"
        )
    return model, ModelIdentity(name=short_name(folder), fingerprint=folder_hash(task_folder(folder)))


def answer_model(folder: str | Path, *, device: str = "auto") -> tuple[AnswerModel, ModelIdentity]:
    """A model that answers questions, with its identity.

    Raises:
        FileNotFoundError: None is there.
        ValueError: A model of another task, or damaged.
    """
    try:
        model = open_answer_model(folder, device=device)
    except ValueError as error:
        raise ValueError(f"--vqa {error}") from error
    return model, ModelIdentity(name=short_name(folder), fingerprint=folder_hash(task_folder(folder)))


def post_model(folder: str | Path, *, device: str = "auto") -> tuple[FusionClassifier, ClassifierIdentity]:
    """A classifier of posts with its identity.

    Raises:
        FileNotFoundError: None is there.
        ValueError: A model of another task, or damaged.
    """
    model = load_classifier(folder, device=device)
    if model.task.kind != "classify":
        raise ValueError(
            f"--classifier {folder}: expected a model trained for classify, it is for {model.task.kind}"
        )
    fingerprint = folder_hash(task_folder(folder))
    return model, ClassifierIdentity(name=short_name(folder), fingerprint=fingerprint, labels=model.labels)


def folder_hash(folder: Path) -> str:
    """A hash of a folder's files and their names; cards for people do not count."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def short_name(model: str | Path) -> str:
    """A name for callers: the last part of a path, since where it lies is nobody's business."""
    return str(model) if str(model).startswith("hf-hub:") else Path(str(model)).name

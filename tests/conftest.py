"""Fixtures for all tests: the real data sets where they lie, and small pictures."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads would spin while they wait for a shared core
ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Everything is imported: half a million objects that no collection need go through again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """And that the end of the process clears away."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the repository; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("PAIRSTREAM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(
            f"no data sets at {folder} (set PAIRSTREAM_SHARED to the folder that holds flickr8k/ and vqav2_small/)"
        )
    return folder


def picture(seed: int, size: tuple[int, int] = (48, 48), format: str = "JPEG") -> bytes:
    """A small encoded picture of smooth coloured noise, the same for the same seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="session")
def make_picture():
    """`make_picture(seed, size=(w, h), format="JPEG") -> bytes`."""
    return picture


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards with 40 pictures of 48 px, two captions each."""
    from data.shards import Sample, ShardWriter

    folder = tmp_path_factory.mktemp("tiny_shards")
    words = ("red", "green", "blue", "small", "large", "round", "square", "striped")
    with ShardWriter(folder, samples_per_shard=15) as writer:
        for number in range(40):
            name = f"a {words[number % 8]} {words[number // 8]} thing"
            writer.write(
                Sample(f"{number:04d}", picture(number), "jpg", (name, f"picture {number} of {name}"))
            )
    return folder


TINY_TOWERS = {
    "kind": "towers",
    "embed_dim": 16,
    "image_tower": {
        "kind": "vit",
        "image_size": 32,
        "patch_size": 16,
        "width": 16,
        "layers": 2,
        "head_width": 8,
    },
    "text_tower": {"kind": "transformer", "context_length": 8, "width": 16, "heads": 2, "layers": 2},
}
TINY_COCA = {**TINY_TOWERS, "decoder": {"layers": 1, "heads": 2, "queries": 4, "pooler_heads": 2}}
TINY_RESNET = {**TINY_TOWERS, "image_tower": {"kind": "resnet", "image_size": 32, "width": 8}}


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, dict]:
    """A recipe's `model` for the smallest ViT and ResNet dual encoders, and for a ViT with a caption decoder."""
    return {"vit": TINY_TOWERS, "resnet": TINY_RESNET, "coca": TINY_COCA}


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with dropout, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny_bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "thing", "picture", "of", "red", "small"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def dies_of_saving(monkeypatch: pytest.MonkeyPatch):
    """`with dies_of_saving(): ...`: the fine-tuning inside is killed when it has saved its first checkpoint."""
    from finetune.trainer import Finetuner

    save = Finetuner.save

    def save_and_die(self):
        save(self)
        raise KeyboardInterrupt

    @contextmanager
    def dies():
        with monkeypatch.context() as patch:
            patch.setattr(Finetuner, "save", save_and_die)
            with pytest.raises(KeyboardInterrupt):
                yield

    return dies


@pytest.fixture
def tiny_recipe(tiny_shards: Path, tmp_path: Path):
    """`tiny_recipe(steps=6, **keys) -> dict`: the plain content of a pretraining recipe of seconds."""

    def make(**keys) -> dict:
        content = {
            "run": str(tmp_path / "run"),
            "model": TINY_TOWERS,
            "data": {"train": str(tiny_shards), "workers": 0, "hflip": 0.5, "color_jitter": 0.2},
            "batch_size": 8,
            "steps": 6,
            "schedule": {"warmup": 2},
            "optim": {"lr": 1e-3},
            "log_every": 1,
            "checkpoint": {"every": 2},
        }
        return {**content, **keys}

    return make


@pytest.fixture(scope="session")
def torchrun():
    """`torchrun("-m", "pairstream", ...)`: two processes of a command by torchrun, which must end well."""

    def start(*words: str | Path, timeout: float = 900) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*launch, *map(str, words)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "ACCELERATE_USE_CPU": "true",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return start


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its set-up for the life of a process; a test that makes a Trainer starts without one."""
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield reset
    reset()


@pytest.fixture(scope="session")
def weights_of():
    """`weights_of(trainer) -> dict`: copies of all of its model's state, by name."""

    def take(trainer) -> dict:
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    return take


@pytest.fixture(scope="session")
def same():
    """`same(one, other) -> bool`: whether two states have the same tensors, bit for bit."""
    import torch

    def compare(one: dict, other: dict) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return compare


@pytest.fixture(scope="session")
def small_encoder():
    """`small_encoder(seed=0, image_size=16, ...) -> Encoder`: one-layer towers, by default for 16 px, on the CPU."""

    def build(
        seed: int = 0, *, image_size: int = 16, patch_size: int = 8, width: int = 32, context: int = 32
    ):
        import torch

        from pretrain.encoder import build_encoder
        from pretrain.recipe_model import TextTransformer, TowersModel, ViT

        image = ViT(
            image_size=image_size, patch_size=patch_size, width=width, layers=1, head_width=width // 2
        )
        text = TextTransformer(context_length=context, width=width, heads=2, layers=1)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_encoder(TowersModel(embed_dim=16, image_tower=image, text_tower=text), device="cpu")

    return build


COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 230),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
}


@pytest.fixture(scope="session")
def coloured():
    """`coloured("red", seed, side=16) -> bytes`: a PNG of one colour, a little different for each seed."""

    def make(colour: str, seed: int, side: int = 16) -> bytes:
        noise = np.random.default_rng(seed).integers(-12, 12, (side, side, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return make


def small_llama(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def unsettle(model) -> None:
    """Weights so large, and an output layer of its own, that the text depends on every position and never repeats."""
    import torch

    torch.manual_seed(2)
    language = model.language_model
    language.config.tie_word_embeddings = False
    language.lm_head.weight = torch.nn.Parameter(torch.randn_like(language.lm_head.weight))
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.5 if ".h." in name or ".layers." in name else 1.0)
        for block in getattr(model.connector, "blocks", ()):
            block.output.weight.normal_(std=1.0)  # the picture should count in such a din


@pytest.fixture(scope="session")
def make_writer():
    """`make_writer(connector, task=None, kind="gpt2", unsettled=False, **options)`: a model that writes, untrained.

    Its gates are open, or no picture would be seen; `unsettled`, its text depends on every position and never repeats.
    """

    def make(connector, task=None, kind: str = "gpt2", *, unsettled: bool = False, **options):
        import torch

        from finetune.language_models import small_language_model
        from finetune.model import VisionLanguageModel
        from finetune.recipe_model import SmallLanguageModel
        from finetune.recipe_task import Decoding, VqaTask
        from finetune.text import train_tokenizer
        from pretrain.encoder import build_encoder
        from pretrain.recipe_model import TextTransformer, TowersModel, ViT

        torch.manual_seed(0)
        tower = ViT(image_size=32, patch_size=8, width=32, layers=1, head_width=16)
        text = TextTransformer(context_length=16, width=16, heads=2, layers=1)
        encoder = build_encoder(TowersModel(embed_dim=16, image_tower=tower, text_tower=text), device="cpu")
        words = ["a red cat on the left", "two blue dogs", "Is there a dog?", "how many cats are there?"]
        tokenizer = train_tokenizer([*words, "yes", "no"], 300)
        torch.manual_seed(1)
        small = SmallLanguageModel(width=32, layers=2, heads=2, context=96, dropout=0.0, vocabulary=300)
        language = small_llama(tokenizer) if kind == "llama" else small_language_model(small, tokenizer)
        # Random embeddings this large make random text that depends on every position.
        torch.nn.init.normal_(language.get_input_embeddings().weight, std=1.0)
        decoding = Decoding(max_new_tokens=10)
        model = VisionLanguageModel(
            encoder, connector, language, tokenizer, task or VqaTask(), decoding, **options
        )
        for name, parameter in model.connector.named_parameters():
            if name.endswith("gates"):
                torch.nn.init.constant_(parameter, 1.0)
        if unsettled:
            unsettle(model)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def run_ranks():
    """`run_ranks(worker, folder, world)`: start `worker FOLDER RANK WORLD` for each rank and wait; all must succeed."""

    def run(worker: Path, folder: Path, world: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        started = [
            subprocess.Popen(
                [sys.executable, str(worker), str(folder), str(rank), str(world)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        for process in started:
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error

    return run

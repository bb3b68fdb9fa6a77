"""Recipes: every one that is carried parses, and a fault names its file, its key and the nearest valid one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.curate.recipe import CurateRecipe
from pairstream.recipe import dump_recipe, find_recipe, load_recipe
from pretrain.recipe import EMA, Phase, PretrainRecipe
from pretrain.recipe_loss import SigmoidConfig
from pretrain.recipe_model import OpenClipModel, ResNet, TimmTower
from pretrain.recipe_optim import WSD, AdamW, LionConfig, MuonConfig

ROOT = Path(__file__).resolve().parents[2]
# Those of training runs; the suites of retrieval are tested in test_suite.py.
CARRIED = sorted(path for path in ROOT.glob("*/recipes/*.yaml") if path.parts[-3] != "retrieval")


def kind_of(path: Path):
    """The recipe class of the stage that carries a file."""
    stage = path.parent.parent.name
    place, name = {"data": ("data.curate.recipe", "CurateRecipe")}.get(
        stage, (f"{stage}.recipe", f"{stage.capitalize()}Recipe")
    )
    return stage, getattr(import_module(place), name)


@pytest.mark.parametrize("path", CARRIED, ids=[f"{path.parent.parent.name}/{path.stem}" for path in CARRIED])
def test_every_carried_recipe_parses_and_resolves_to_itself(path, tmp_path):
    stage, kind = kind_of(path)
    recipe = load_recipe(kind, stage, path.stem)
    dump_recipe(recipe, tmp_path / "recipe.resolved.yaml")
    assert load_recipe(kind, stage, str(tmp_path / "recipe.resolved.yaml")) == recipe
    if "optim" not in kind.model_fields:
        return  # only training commands take overrides
    changed = load_recipe(kind, stage, path.stem, ["--run", "elsewhere", "--optim.lr", "3e-3"])
    assert (changed.run, changed.optim.lr) == ("elsewhere", 3e-3)
    same = {"run": recipe.run, "optim": recipe.optim}
    assert changed.model_copy(update=same) == recipe  # an override changes nothing else


@pytest.fixture
def write(tmp_path, tiny_recipe):
    """`write(**keys) -> str`: the path of a recipe file."""

    def make(**keys) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe(**keys)))
        return str(path)

    return make


def load(path: str, *words: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, "pretrain", path, words)


FAULTS = {
    "unknown key": ({"batchsize": 4}, r"mine.yaml: batchsize: unknown key; did you mean 'batch_size'\?"),
    "unknown nested key": ({"optim": {"lrr": 1}}, r"optim.lrr: unknown key; did you mean 'lr'\?"),
    "unknown key far from all": (
        {"optim": {"zzz": 1}},
        r"optim.zzz: unknown key; valid here: betas, clip_norm",
    ),
    "unknown key in a tower": (
        {"model": {"kind": "towers", "image_tower": {"kind": "resnet", "widht": 8}}},
        r"widht: unknown key; did you mean 'width'\?",
    ),
    "unknown key in a list": (
        {"evaluate": [{"use": "a:B", "evry": 3}]},
        r"evaluate.0.evry: unknown key; did you mean 'every'\?",
    ),
    "wrong type": ({"steps": "many"}, r"steps: .*valid integer.* \(got 'many'\)"),
    "wrong kind": (
        {"model": {"kind": "tower"}},
        r"model.kind: expected one of towers, open_clip, got 'tower'; did you mean 'towers'",
    ),
    "missing key": ({"data": {}}, r"data.train: Field required"),
    "empty shard list": ({"data": {"train": []}}, r"data.train: the shard list is empty"),
    "warm-up too long": ({"schedule": {"warmup": 6}}, r"schedule.warmup \(6\) must be below steps \(6\)"),
    "batch of one": ({"batch_size": 1}, r"batch_size: .*greater than or equal to 2 \(got 1\)"),
    "negative rate": ({"optim": {"lr": -1}}, r"optim.lr: .*greater than 0"),
    "no clipping by zero": ({"optim": {"clip_norm": 0}}, r"optim.clip_norm: .*greater than 0"),
    "several captions of a loss for one": (
        {"data": {"train": "x", "captions_per_image": 2}},
        r"captions_per_image 2 needs data.captions: random and loss: {kind: multi_positive}, got random and info_nce",
    ),
    "late phase": ({"phases": [{"step": 2}]}, r"phases must begin at step 0 and go upwards, got steps \[2\]"),
    "locks": ({"locks": [{}]}, "the key locks is called phases now"),
    "patch dropout of a locked tower": (
        {"phases": [{"image_groups": 0, "keep_statistics": False, "patch_dropout": 0.5}]},
        r"phases.0.patch_dropout: the image tower is or was locked",
    ),
    "patch dropout of a tower that keeps statistics": (
        {"phases": [{"image_groups": 0}, {"step": 2, "patch_dropout": 0.5}]},
        r"phases.1.patch_dropout: .* set keep_statistics: false",
    ),
    "another size than the teachers'": (
        {"loss": {"kind": "distillation", "teachers": ["x"]}, "phases": [{"image_size": 16}]},
        "phases.0.image_size: teachers see the student's pictures",
    ),
    "patches": (
        {"model": {"kind": "towers", "image_tower": {"kind": "vit", "image_size": 60, "patch_size": 16}}},
        "image_size 60 is not a multiple of patch_size 16",
    ),
    "heads": (
        {"model": {"kind": "towers", "text_tower": {"kind": "transformer", "width": 10, "heads": 4}}},
        "width 10 is not a multiple of heads 4",
    ),
    "head width": (
        {"model": {"kind": "towers", "image_tower": {"kind": "vit", "width": 100}}},
        "width 100 is not a multiple of head_width 64",
    ),
    "resnet size": (
        {"model": {"kind": "towers", "image_tower": {"kind": "resnet", "image_size": 40}}},
        "image_size 40 is not a multiple of 32",
    ),
    "seed": ({"seed": -1}, "seed: .*greater than or equal to 0"),
    "every sample bad": ({"data": {"train": "x", "max_faults": 1}}, "data.max_faults: .*less than 1"),
    "evaluator": (
        {"evaluate": [{"use": "retrieval.evaluator"}]},
        r"evaluate.0.use: expected an import string",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_key(write, name):
    keys, said = FAULTS[name]
    with pytest.raises(ValueError, match=said):
        load(write(**keys))


def test_all_faults_come_in_one_message(write):
    with pytest.raises(ValueError, match=r"(?s)steps: .*\n.*optim.lrr: "):
        load(write(steps="many", optim={"lrr": 1}))


def test_overrides_change_nested_keys_and_lists_stay(write):
    path = write(
        phases=[Phase().model_dump()], evaluate=[{"use": "a:B", "options": {"data": "x", "k": [1, 5]}}]
    )
    recipe = load(path, "--optim.lr", "2e-3", "--data.workers", "3", "--model.image-tower.layers", "5")
    assert (recipe.optim.lr, recipe.data.workers) == (2e-3, 3)
    assert recipe.model.image_tower.layers == 5  # pyright: ignore
    assert recipe.evaluate == load(path).evaluate


def test_an_override_goes_over_to_another_kind(write):
    path = write(optim={"lr": 3e-3, "clip_norm": None, "eps": 1e-4}, loss={"kind": "info_nce", "tile": 64})
    recipe = load(
        path,
        "--optim.kind",
        "lion",
        "--optim.weight-decay",
        "0.7",
        "--schedule.kind=wsd",
        "--schedule.decay",
        "2",
    )
    assert recipe.optim == LionConfig(lr=3e-3, clip_norm=None, weight_decay=0.7)  # eps is no key of Lion's
    assert recipe.schedule == WSD(warmup=2, decay=2)
    recipe = load(
        path,
        "--schedule.decay",
        "3",
        "--optim.momentum",
        "0.8",
        "--schedule.kind",
        "wsd",
        "--optim.kind",
        "muon",
    )
    assert recipe.optim == MuonConfig(lr=3e-3, clip_norm=None, eps=1e-4, momentum=0.8)
    assert recipe.schedule == WSD(warmup=2, decay=3)
    assert load(path, "--loss.kind", "sigmoid").loss == SigmoidConfig(tile=64)
    assert load(path, "--optim.kind", "adamw") == load(path)
    back = load(write(optim={"kind": "muon", "lr": 0.1, "momentum": 0.5}), "--optim.kind", "adamw")
    assert back.optim == AdamW(lr=0.1)


def test_an_override_goes_over_to_another_tower_or_model(write):
    path = write()
    resnet: Any = load(path, "--model.image-tower.kind", "resnet", "--model.embed-dim", "24").model
    assert resnet.embed_dim == 24
    assert resnet.image_tower == ResNet(image_size=32, width=16)  # a ViT's layers are no ResNet's
    timm = ("--model.image-tower.kind", "timm", "--model.image-tower.name", "test_vit")
    towers: Any = load(path, *timm).model
    assert towers.image_tower == TimmTower(name="test_vit", image_size=32)
    named = load(path, "--model.kind", "open_clip", "--model.name", "ViT-B-32").model
    assert named == OpenClipModel(name="ViT-B-32")


def test_an_override_sets_keys_of_a_part_that_was_null(write):
    assert load(write(), "--ema.decay", "0.9").ema == EMA(decay=0.9)
    assert load(write(ema={"decay": 0.9}), "--ema.no-ramp").ema == EMA(decay=0.9, ramp=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--optim.kind muonn",
            r"with --optim.kind muonn: optim.kind: expected .* muon, lion, .*, got 'muonn'; did you mean 'muon'",
        ),
        ("--optim.kind", r"optim.kind: expected one of adamw"),
        (
            "--optim.momentum 0.9",
            r"optim.momentum: optim is of kind adamw, which has betas, .*; muon and adafactor have .*kind muon",
        ),
        (
            "--optim.kind lion --optim.eps 1",
            r"optim.eps: optim is of kind lion, which has betas, clip_norm, .*; adamw, muon and schedule_free have eps",
        ),
        (
            "--schedule.decay 5",
            r"schedule.decay: schedule is of kind cosine, .*; wsd has decay: give --schedule.kind wsd",
        ),
        (
            "--loss.kind hard_negatives --loss.tile 3",
            "loss.tile: loss is of kind hard_negatives, which has beta",
        ),
        (
            "--model.image-tower.kind resnet --model.image-tower.patch-size 4",
            r"model.image_tower.patch_size: model.image_tower is of kind resnet",
        ),
        ("--optim.kind lion --optim.lr -1", r"optim.lr: .*greater than 0 \(got -1.0\)"),
    ],
)
def test_a_key_or_kind_that_does_not_fit_is_refused(write, words, said):
    with pytest.raises(ValueError, match=said):
        load(write(), *words.split())


def test_a_kind_that_needs_a_key_asks_for_it(write, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(write(), "--model.image-tower.kind", "timm")
    assert stopped.value.code == 2
    assert "--model.image-tower.name" in capsys.readouterr().err


def test_an_override_that_makes_a_recipe_impossible_is_refused(write):
    """Rules between keys and bounds of nested ones have the message that a recipe file would get."""
    with pytest.raises(
        ValueError, match=r"yaml with --schedule.warmup 9: .*schedule.warmup \(9\) must be below"
    ):
        load(write(), "--schedule.warmup", "9")
    with pytest.raises(ValueError, match=r"yaml with --optim.lr -1: optim.lr: .*greater than 0 \(got -1.0\)"):
        load(write(), "--optim.lr", "-1")


def test_help_lists_the_keys_with_their_meaning_and_value(write, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(write(), "--help")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "All of a pretraining run." in said
    assert "AdamW without decay on gains" in said
    assert "(default: 0.001)" in said
    assert "model_construct" not in said


def test_an_unknown_override_names_the_nearest(write, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(write(), "--optim.lrr", "1")
    assert stopped.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err


def test_what_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"a.yaml: expected a recipe \(a mapping of keys\), got list"):
        load(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"b\.yaml: not a YAML recipe"):
        load(str(tmp_path / "b.yaml"))
    with pytest.raises(FileNotFoundError, match=r"no recipe 'flickr8k_cpuu': .*did you mean 'flickr8k_cpu'"):
        find_recipe("pretrain", "flickr8k_cpuu")


def test_recipes_are_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        load(write()).steps = 3  # pyright: ignore


def test_a_required_key_may_come_from_the_command_line_alone(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("filters: [{kind: word_count}, {kind: language}]\nleaks: {drop: false}\n")

    def curate(*words: str) -> CurateRecipe:
        return load_recipe(CurateRecipe, "data", str(path), words)

    words = ("--out", "there", "--leaks.shards=dev", "--filters.1.allow", "en", "--filters.0.min", "4")
    recipe = curate("--shards", "web", *words)
    assert (recipe.shards, recipe.out) == ("web", "there")
    assert recipe.leaks is not None
    assert recipe.leaks.shards == "dev"
    assert [rule.model_dump() for rule in recipe.filters] == [
        {"kind": "word_count", "min": 4, "max": None},
        {"kind": "language", "allow": ("en",), "certainty": 0.5},
    ]
    assert curate("--shards", "a", "b", *words).shards == ("a", "b")
    with pytest.raises(ValueError, match=r"rules.yaml: shards: Field required"):
        curate(*words)


def test_a_mistyped_kind_in_a_list_names_the_nearest(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("shards: a\nout: b\nfilters: [{kind: word_count}, {kind: captionlength}]\n")
    with pytest.raises(
        ValueError, match=r"filters.1.kind: expected one of .*, got 'captionlength'; did you mean "
    ):
        load_recipe(CurateRecipe, "data", str(path))
    path.write_text("shards: a\nout: b\nfilters: [{min: 3}]\n")
    with pytest.raises(ValueError, match=r"filters.0: no kind, which says what it is"):
        load_recipe(CurateRecipe, "data", str(path))

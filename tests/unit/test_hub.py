"""What goes to the hub, without going there."""

from __future__ import annotations

import json

import pytest

from pairstream.cli import run_stage
from pretrain.cli import main
from pretrain.encoder import build_encoder, load_encoder
from pretrain.hub import stage
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.report import model_card


@pytest.fixture
def checkpoint(tiny_recipe, tiny_models, tmp_path):
    """A checkpoint in a run folder, with the card that a run gives it."""
    recipe = PretrainRecipe.model_validate(tiny_recipe())
    card = model_card(recipe, 6, 48, {"6": {"recall": 0.25}})
    encoder = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu")
    return encoder.save(tmp_path / "run/checkpoints/step-00000006/model", card)


@pytest.fixture
def offline(monkeypatch):
    """Whatever would reach the hub fails the test."""
    import huggingface_hub

    def reached(*args, **keys):
        raise AssertionError("a dry run reached for the hub")

    for name in ("create_repo", "upload_folder", "create_branch"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, reached)


def test_a_dry_run_lists_what_would_go(checkpoint, tmp_path, capsys, offline):
    assert run_stage(main, ["push", str(tmp_path / "run"), "--repo", "org/name", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for path in checkpoint.iterdir():
        assert f"{path.name}\n" in said
    assert "dry run: 3 files, " in said
    assert "https://huggingface.co/org/name" in said


def test_an_upload_is_of_the_staged_folder(checkpoint, tmp_path, capsys, monkeypatch):
    """The hub's client stands in for the hub: what it is asked to do, and what the folder held at that moment."""
    import huggingface_hub

    asked = []

    def note(name):
        def call(self, *args, **keys):
            folder = keys.get("folder_path")
            held = load_encoder(folder).fingerprint if folder else None
            asked.append((name, args, {**keys, "folder_path": held} if folder else keys))

        return call

    for name in ("create_repo", "upload_folder", "create_branch"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, note(name))
    assert (
        run_stage(main, ["push", str(tmp_path / "run"), "--repo", "org/name", "--private", "--branch", "b"])
        == 0
    )
    assert asked == [
        ("create_repo", ("org/name",), {"private": True, "exist_ok": True}),
        ("create_branch", ("org/name",), {"branch": "b", "exist_ok": True}),
        (
            "upload_folder",
            (),
            {
                "repo_id": "org/name",
                "folder_path": load_encoder(checkpoint).fingerprint,
                "revision": "b",
                "commit_message": "Add step-00000006",
            },
        ),
    ]
    assert 'hf-hub:org/name"' in capsys.readouterr().out


def test_card_and_configuration_name_the_repo_and_no_place_of_this_machine(
    checkpoint, tiny_models, tiny_bert, tmp_path
):
    (tmp_path / "staged").mkdir()
    stage(checkpoint, "org/name", tmp_path / "staged", "mit")
    card = (tmp_path / "staged/README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: open_clip\n")
    assert 'create_model_and_transforms("hf-hub:org/name")' in card
    assert "| recall | 0.25 |" in card
    bert = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    model = {**tiny_models["vit"], "text_tower": bert}
    saved = build_encoder(TowersModel.model_validate(model), device="cpu").save(tmp_path / "bert")
    (tmp_path / "staged-bert").mkdir()
    stage(saved, "org/name", tmp_path / "staged-bert")
    text = json.loads((tmp_path / "staged-bert/open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert (text["hf_model_name"], text["hf_tokenizer_name"]) == ("org/name", "org/name")
    for file in (tmp_path / "staged-bert").iterdir():
        if file.suffix == ".json":
            assert str(tmp_path) not in file.read_text(), file.name
    assert load_encoder(tmp_path / "staged-bert").encode_texts(["a thing"]).shape == (1, 16)


@pytest.mark.parametrize("repo", ["name", "a/b/c", "org/na me", "../x"])
def test_names_that_are_no_repo(checkpoint, tmp_path, capsys, repo):
    assert run_stage(main, ["push", str(tmp_path / "run"), "--repo", repo, "--dry-run"]) == 2
    assert "expected ORG/NAME" in capsys.readouterr().err


def test_what_cannot_be_pushed(checkpoint, tmp_path, capsys, offline):
    assert run_stage(main, ["push", str(tmp_path / "absent/run"), "--repo", "org/name"]) == 2
    assert "no folder" in capsys.readouterr().err
    assert run_stage(main, ["push", "ViT-B-32", "--repo", "org/name"]) == 2
    assert "no folder ViT-B-32: expected a run folder or a checkpoint" in capsys.readouterr().err
    weights = checkpoint / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run_stage(main, ["push", str(tmp_path / "run"), "--repo", "org/name", "--dry-run"]) == 2
    assert "not a whole safetensors file" in capsys.readouterr().err

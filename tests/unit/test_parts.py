"""Where a task model's parts come from and under which licence: cards, packages, and what is not known."""

from __future__ import annotations

from finetune.parts import UNKNOWN, encoder_part, licence, parts_of
from finetune.recipe import FinetuneRecipe
from pretrain.recipe_model import OpenClipModel, TextTransformer, TimmTower, TowersModel


def test_cards_and_packages_say_the_licence(tmp_path):
    assert licence(str(tmp_path)) is None
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\ntags: [clip]\n---\n# A model --- of ours\n")
    assert licence(str(tmp_path)) == "apache-2.0"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert licence(str(tmp_path / "model.safetensors")) == "apache-2.0"
    card.write_text("---\nlicense: other\nlicense_name: llama3\n---\n")
    assert licence(str(tmp_path)) == "llama3"
    for text in ("# no header", "---\n[\n---\n", "---\n- a\n---\n"):
        card.write_text(text)
        assert licence(str(tmp_path)) is None
    assert licence("package:open_clip_torch/x") == "MIT License" or licence("package:torch/x")
    assert licence("package:there_is_none/x") is None
    assert licence("ViT-B-32") is None
    assert licence("nobody/has-this") is None  # and no network here


def test_a_recipe_names_its_parts(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    content = {
        "run": "r",
        "model": {"name": str(tmp_path)},
        "task": {"kind": "caption"},
        "data": {"train": "x", "val": "x"},
        "steps": 100,
        "language_model": {"kind": "pretrained", "name": str(tmp_path)},
    }
    found = parts_of(FinetuneRecipe.model_validate(content))
    assert found["encoder"] == {"name": str(tmp_path), "licence": "mit"} == found["language_model"]
    choose = {**content, "task": {"kind": "match"}, "language_model": {"kind": "config"}}
    assert list(parts_of(FinetuneRecipe.model_validate(choose))) == ["encoder"]
    named = encoder_part(OpenClipModel(name="ViT-B-32", pretrained="laion2b_s34b_b79k"))
    assert named == {"name": "ViT-B-32, laion2b_s34b_b79k", "licence": UNKNOWN}
    towers = TowersModel(
        image_tower=TimmTower(name="x", weights=str(tmp_path / "w.pth")), text_tower=TextTransformer()
    )
    assert encoder_part(towers)["name"] == f"{tmp_path / 'w.pth'}; a text tower of its own"

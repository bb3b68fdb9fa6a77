"""The words after `pairstream STAGE`."""

from __future__ import annotations

import pytest
import yaml

from pairstream.command import read_training_command
from pretrain.recipe import PretrainRecipe


@pytest.fixture
def recipe(tmp_path, tiny_recipe) -> str:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_recipe()))
    return str(tmp_path / "mine.yaml")


def read(*words: str):
    return read_training_command("pretrain", PretrainRecipe, words)


def test_a_recipe_its_overrides_and_the_flags(recipe):
    command = read(recipe, "--steps", "9", "--resume")
    assert command is not None
    assert (command.recipe.steps, command.resume, command.overwrite) == (9, True, False)
    command = read("--overwrite", recipe)
    assert command is not None
    assert (command.recipe.steps, command.resume, command.overwrite) == (6, False, True)


def test_help_without_and_with_a_recipe(recipe, capsys):
    assert read("--help") is None
    assert "usage: pairstream pretrain RECIPE" in (said := capsys.readouterr().out)
    assert "flickr8k_cpu" in said
    with pytest.raises(SystemExit) as stopped:
        read(recipe, "--help")
    assert stopped.value.code == 0
    assert "--optim.lr" in capsys.readouterr().out


def test_help_names_what_a_recipe_still_lacks(tmp_path, capsys):
    (tmp_path / "part.yaml").write_text(
        "{data: {temperature: 3}, log_every: 7, model: {kind: towers, image_tower: {kind: timm, image_size: 96}}}"
    )
    with pytest.raises(SystemExit) as stopped:
        read(str(tmp_path / "part.yaml"), "--help")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "Optimiser steps. (required)" in said
    assert "Optimiser steps between lines of log.jsonl. (default: 7)" in said
    for key, default in (("data.temperature", "3.0"), ("model.image-tower.image-size", "96")):
        assert f"(default: {default})" in said.split(f"--{key} ")[1].split(" --")[0]
    assert "(required)" in said.split("--model.image-tower.name ")[1].split(" --")[0]
    (tmp_path / "wrong.yaml").write_text("{data: {trian: shards}}")
    with pytest.raises(ValueError, match=r"data.trian: unknown key; did you mean 'train'"):
        read(str(tmp_path / "wrong.yaml"), "--help")


def test_no_recipe_and_both_flags_are_refused(recipe):
    with pytest.raises(ValueError, match=r"which recipe\? One of .*flickr8k_cpu.*, or a YAML file"):
        read()
    with pytest.raises(ValueError, match="which recipe"):
        read("--steps", "3")
    with pytest.raises(ValueError, match="--resume continues a run and --overwrite replaces it"):
        read(recipe, "--resume", "--overwrite")
    with pytest.raises(FileNotFoundError, match="no recipe 'absent'"):
        read("absent")


def test_resume_may_name_another_checkpoint_where_the_stage_takes_one(recipe):
    def resumes(*words: str):
        command = read_training_command("pretrain", PretrainRecipe, words, resumes_others=True)
        assert command is not None
        assert command.recipe.steps == 6
        return command.resume

    assert resumes(recipe) is False
    assert resumes(recipe, "--resume") is True
    assert resumes(recipe, "--resume", "--seed", "1") is True
    assert resumes("--resume", recipe) is True  # the word after it is the recipe
    assert resumes("--resume", "auto", recipe) is True
    assert resumes(recipe, "--resume", "auto", "--seed", "1") is True
    assert resumes(recipe, "--resume", "runs/old", "--seed", "1") == "runs/old"
    assert resumes("--resume=runs/old", recipe) == "runs/old"
    with pytest.raises(ValueError, match="--resume runs/old: `pairstream pretrain` continues only"):
        read(recipe, "--resume", "runs/old")

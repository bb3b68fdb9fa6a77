"""Parts that train, wait or are adapted; the check of the first step; best models, early stops, mixed tasks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data.shards import Sample, ShardWriter
from finetune.guard import FirstStep
from finetune.language_models import pretrained_language_model, small_language_model
from finetune.lora import add_lora, has_lora, load_adapter, without_adapters
from finetune.model import build_task_model, load_task_model
from finetune.recipe import FinetuneRecipe
from finetune.recipe_model import Lora, SmallLanguageModel
from finetune.report import write_report
from finetune.text import train_tokenizer
from finetune.trainer import Finetuner
from pairstream.recipe import validate

COLOURS = ("red", "green", "blue", "white")
SMALL = {"kind": "config", "width": 32, "layers": 1, "heads": 2, "context": 64, "vocabulary": 300}


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_encoder, coloured) -> Path:
    """Coloured pictures, some with a caption, some with questions; an encoder and a small pretrained language model."""
    root = tmp_path_factory.mktemp("parts")
    for split, count in (("train", 32), ("val", 12)):
        with ShardWriter(root / split, samples_per_shard=10) as writer:
            for number in range(count):
                colour = COLOURS[number % 4]
                question = {"question": "what colour is it?", "answers": [colour] * 10}
                record = {} if number % 3 == 0 else {"questions": [question]}
                captions = [] if number % 3 == 1 else [f"a {colour} picture"]
                picture = coloured(colour, number + 1000 * (split == "val"))
                writer.write(Sample(f"{number:03d}", picture, "png", captions, record))
    small_encoder(image_size=32, patch_size=16, context=16).save(root / "encoder")
    texts = [f"a {colour} picture what colour is it?" for colour in COLOURS]
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(1)
    model = small_language_model(
        SmallLanguageModel(width=32, layers=2, heads=2, context=64, dropout=0.0, vocabulary=300), tokenizer
    )
    model.save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    return root


def recipe(world: Path, run: Path, task: dict | None = None, **changes) -> FinetuneRecipe:
    content = {
        "run": str(run),
        "model": {"name": str(world / "encoder")},
        "task": task or {"kind": "mixed"},
        "data": {"train": str(world / "train"), "val": str(world / "val"), **changes.pop("data", {})},
        "language_model": changes.pop("language_model", SMALL),
        "batch_size": 8,
        "steps": 20,
        "optim": {"lr": 1e-2},
        "schedule": {"warmup": 2},
        "decoding": {"max_new_tokens": 12},
        "log_every": 10,
        **changes,
    }
    return validate(FinetuneRecipe, content, "test")


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by file and name."""
    folder = run / f"checkpoints/step-{step:08d}"
    return {
        f"{file.relative_to(folder)}|{name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def killed_and_resumed(chosen: FinetuneRecipe, dies_of_saving) -> None:
    with dies_of_saving():
        Finetuner(chosen).train()
    Finetuner(chosen, resume=True).train()


@pytest.mark.parametrize("dora", [False, True])
def test_twenty_steps_with_adapters_are_ten_and_ten(world, tmp_path, dies_of_saving, dora, coloured):
    changes = {
        "language_model": {"kind": "pretrained", "name": str(world / "lm")},
        "lora": {"rank": 4, "dropout": 0.1, "dora": dora},
        "connector": {"kind": "cross_attention", "heads": 2},
        "freeze_image_tower": False,
        "waits": {"towers": 5},
        "rates": {"language_model": 0.5},
        "checkpoint": {"every": 10, "keep": 3},
        "gradient_checkpointing": not dora,
        "length_groups": 2,
    }
    Finetuner(recipe(world, tmp_path / "straight", **changes)).train()
    killed_and_resumed(recipe(world, tmp_path / "killed", **changes), dies_of_saving)
    straight, killed = tensors(tmp_path / "straight", 20), tensors(tmp_path / "killed", 20)
    assert straight.keys() == killed.keys()
    assert [name for name in straight if not torch.equal(straight[name], killed[name])] == []
    # The base is as it came, the adapters are not, and the folder opens on its own.
    base = load_file(world / "lm/model.safetensors")
    kept = {name.split("|")[1]: value for name, value in straight.items() if "language_model/model" in name}
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], base[name]) for name in base)
    adapters = {name: value for name, value in straight.items() if name.startswith("model/adapter")}
    assert any("magnitude" in name for name in adapters) == dora
    assert all(bool(value.any()) for value in adapters.values())
    model = load_task_model(tmp_path / "straight", device="cpu")
    assert has_lora(model.language_model)
    written = json.loads((tmp_path / "straight/predictions.json").read_text())
    answer = model.answer([coloured("red", 1000)], ["what colour is it?"])
    assert isinstance(answer[0], str)
    assert len(written) == 8 + 8  # four of the twelve have no caption, four no questions
    going_on = {**changes, "lora": {"rank": 8}, "language_model": {"kind": "continued"}}
    going_on |= {"model": {"name": str(tmp_path / "straight")}}
    other = recipe(world, tmp_path / "other", **going_on)
    with pytest.raises(ValueError, match="keeps its own, so give them as `lora`"):
        Finetuner(other)


def test_parts_wait_and_have_their_own_rates(world, tmp_path):
    changes = {
        "freeze_image_tower": False,
        "waits": {"towers": 4},
        "steps": 6,
        "checkpoint": {"every": 2, "keep": 9},
        "log_every": 2,
    }
    task = {"kind": "caption"}
    run = recipe(world, tmp_path / "run", task, data={"max_faults": 0.9}, **changes)
    trainer = Finetuner(run)
    scales = {
        name.split(".")[0]: group["lr_scale"]
        for group in trainer.optimizer.param_groups
        for name in group["names"]
    }
    assert scales == {"image_tower": 0.1, "connector": 1.0, "language_model": 1.0}
    trainer.train()
    steps = {step: tensors(tmp_path / "run", step) for step in (2, 4, 6)}
    moved = {
        step: {name.split("/")[1] for name in steps[2] if not torch.equal(steps[2][name], steps[step][name])}
        for step in (4, 6)
    }
    assert "encoder" not in moved[4]
    assert "encoder" in moved[6]
    assert {"connector.safetensors|layers.0.weight", "language_model"} <= moved[4]
    assert not any("image_tower" in name for name in steps[4])  # no moments either
    with pytest.raises(ValueError, match="waits must be below steps"):
        recipe(world, tmp_path / "r", waits={"towers": 20})
    with pytest.raises(ValueError, match="this one is new: train it"):
        recipe(world, tmp_path / "r", lora={"rank": 2})


def test_dead_and_moving_parameters_are_named(small_encoder):
    """LoRA on `out_proj` of open_clip's attention never runs: its parent hands the weight on instead."""
    encoder = small_encoder(image_size=32, patch_size=16, context=16)
    encoder.model.visual.requires_grad_(False)
    encoder.model.visual.conv1.requires_grad_(True)
    add_lora(encoder.model.visual.transformer, Lora(rank=2, targets=("out_proj",)))
    guard = FirstStep(encoder.model.visual)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    encoder.image_tokens(images).sum().backward()
    with pytest.raises(
        ValueError, match=r"2 tensors \(.*out_proj\.lora_A.*\) should train and got no gradient"
    ):
        guard.after_backward()
    alive = small_encoder(image_size=32, patch_size=16, context=16)
    add_lora(alive.model.visual.transformer, Lora(rank=2, targets=("c_fc", "c_proj")))
    for name, parameter in alive.model.visual.named_parameters():
        parameter.requires_grad_("lora_" in name)
    guard = FirstStep(alive.model.visual)
    alive.image_tokens(images).sum().backward()
    guard.after_backward()
    guard.after_step()
    frozen = alive.model.visual.conv1.weight
    with torch.no_grad():
        frozen.view(-1)[3] = torch.nextafter(frozen.view(-1)[3], torch.tensor(9.0))
    with pytest.raises(ValueError, match=r"1 tensors \(conv1\.weight\) should be frozen and changed"):
        guard.after_step()


def test_the_first_step_is_checked_in_training(world, tmp_path, monkeypatch):
    def with_idle(*parts):
        model = build_task_model(*parts)
        model.idle = nn.Parameter(torch.zeros(3))  # pyright: ignore
        return model

    monkeypatch.setattr("finetune.families.build_task_model", with_idle)
    trainer = Finetuner(recipe(world, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"1 tensors \(idle\) should train and got no gradient"):
        trainer.train()


def test_adapters_of_a_wrong_name_or_shape_are_refused(world, tmp_path):
    model = pretrained_language_model(str(world / "lm"))[0]
    with pytest.raises(ValueError, match=r"lora\.targets \['nothing'\]"):
        add_lora(model, Lora(rank=2, targets=("nothing",)))
    plain = pretrained_language_model(str(world / "lm"))[0]
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    adapted = add_lora(plain, Lora(rank=2))
    with without_adapters(adapted):
        after = {name: value.clone() for name, value in adapted.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert has_lora(adapted)  # they are back
    save_file({"other": torch.zeros(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"adapter\.safetensors does not fit"):
        load_adapter(adapted, tmp_path)


def test_the_best_model_is_kept_and_a_run_without_progress_stops(world, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.3, 0.2, 0.5])
    judge = Finetuner.judge

    def judged(self):
        numbers, rows = judge(self)
        return {**numbers, "mean_of_tasks": next(scores)}, rows

    def reported(*parts, step):
        reports.append(step)
        write_report(*parts, step=step)

    reports = []
    monkeypatch.setattr("finetune.trainer.write_report", reported)
    monkeypatch.setattr(Finetuner, "judge", judged)
    chosen = recipe(
        world,
        tmp_path / "run",
        evaluate={"every": 2, "select": "best", "patience": 2, "batch_size": 12},
        checkpoint={"every": 2, "keep": 20},
    )
    metrics = Finetuner(chosen).train()
    # 0.1, 0.5 and two that are worse; then the best one is judged once more.
    assert (metrics["steps"], metrics["model_of_step"]) == (8, 4)
    assert metrics["model"] == str(tmp_path / "run/best")
    assert reports == [2, 4, 6, 8, 4]  # one at each evaluation, and at the end that of the best
    best = load_file(tmp_path / "run/best/connector.safetensors")
    fourth, eighth = (
        load_file(tmp_path / f"run/checkpoints/step-0000000{step}/model/connector.safetensors")
        for step in (4, 8)
    )
    assert all(torch.equal(best[name], fourth[name]) for name in best)
    assert not all(torch.equal(best[name], eighth[name]) for name in best)
    opened = load_task_model(tmp_path / "run", device="cpu")
    assert torch.equal(opened.connector.state_dict()["norm.weight"], best["norm.weight"])
    with pytest.raises(ValueError, match="compare evaluations: set every"):
        recipe(world, tmp_path / "r", evaluate={"patience": 2})


def test_captions_and_questions_in_one_run(world, tmp_path, coloured):
    metrics = Finetuner(recipe(world, tmp_path / "run", steps=60)).train()
    assert metrics["caption"]["cider"] > 2 * metrics["caption"]["baseline_cider"]
    assert metrics["vqa"]["accuracy"] > 0.9
    assert (metrics["caption"]["images"], metrics["vqa"]["images"], metrics["images"]) == (8, 8, 12)
    model = load_task_model(tmp_path / "run", device="cpu")
    picture = coloured("green", 5)
    assert model.caption([picture]) == ["a green picture"]
    assert model.answer([picture], ["what colour is it?"]) == ["green"]
    assert "Captions and visual questions" in (tmp_path / "run/report.html").read_text()
    with pytest.raises(ValueError, match="could not tell a caption from an answer"):
        recipe(world, tmp_path / "r", {"kind": "mixed", "caption": {"prompt": " "}})


def test_groups_of_length_give_the_same_loss(world, tmp_path):
    trainer = Finetuner(recipe(world, tmp_path / "run"))
    batch = next(iter(trainer.stream.iterate(0, 1)))
    trainer.model.eval()
    losses = []
    with torch.no_grad():
        for groups in (1, 2, 3):
            trainer.model.length_groups = groups
            losses.append(float(trainer.model(**batch.data)))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_rewards_are_cider_with_the_frequencies_of_the_training_captions():
    from finetune.metrics import DocumentFrequencies, cider
    from finetune.recipe_task import Reward
    from finetune.reward import SelfCritic, until_end

    captions = {3: ["a red cat.", "the cat"], 5: ["a blue dog"], 9: ["a green bird"]}
    critic = SelfCritic(captions, Reward(after=0))
    tokens = [["a red cat", "the cat"], ["a blue dog"], ["a green bird"]]
    expected = cider(["a red cat", "a blue cat"], tokens[:2], DocumentFrequencies.of(tokens))[1]
    assert critic.rewards(["A red cat!", "a blue cat"], [3, 5]).tolist() == pytest.approx(expected)
    assert expected[0] > expected[1] > 0
    assert until_end([4, 1, 1], 1) == [4, 1]
    assert until_end([4, 5], 1) == [4, 5]
    with pytest.raises(ValueError, match="1 training pictures have captions: the reward needs at least two"):
        SelfCritic({0: ["x"]}, Reward(after=0))


def test_self_critical_training_raises_the_reward(world, tmp_path, monkeypatch, dies_of_saving):
    """Begun from a captioner that is half-way, the drawn captions get better; and it resumes bit for bit."""
    changes = {
        "steps": 40,
        "reward": {"after": 8, "samples": 6, "rate": 0.3},
        "data": {"max_faults": 0.9, "cache_image_tokens": True},
        "language_model": {**SMALL, "dropout": 0.0},
        "batch_size": 16,
        "checkpoint": {"every": 20, "keep": 3},
    }
    from finetune.reward import SelfCritic

    found: list[float] = []
    rewards = SelfCritic.rewards

    def watched(self, written, indices):
        result = rewards(self, written, indices)
        if len(written) > len(set(indices)):  # the drawn ones, several a picture
            found.append(float(result.mean()))
        return result

    monkeypatch.setattr(SelfCritic, "rewards", watched)
    chosen = recipe(world, tmp_path / "run", {"kind": "caption"}, **changes)
    Finetuner(chosen).train()
    assert len(found) == 32
    assert np.mean(found[-10:]) > 1.3 * np.mean(found[:10])
    killed_and_resumed(recipe(world, tmp_path / "killed", {"kind": "caption"}, **changes), dies_of_saving)
    straight, killed = tensors(tmp_path / "run", 40), tensors(tmp_path / "killed", 40)
    assert [name for name in straight if not torch.equal(straight[name], killed[name])] == []
    with pytest.raises(ValueError, match=r"reward is for captions \(CIDEr-D\), this task is mixed"):
        recipe(world, tmp_path / "r", reward={"after": 3})
    with pytest.raises(ValueError, match=r"reward\.after must be below steps"):
        recipe(world, tmp_path / "r", {"kind": "caption"}, reward={"after": 20})


def test_weighted_texts_are_a_weighted_sum(world, tmp_path):
    trainer = Finetuner(recipe(world, tmp_path / "run"))
    batch = next(iter(trainer.stream.iterate(0, 1))).data
    model = trainer.model.eval()
    weights = torch.linspace(-1, 2, len(batch["labels"]))
    with torch.no_grad():
        found = [float(model(**batch, weights=weights))]
        model.length_groups = 2
        found.append(float(model(**batch, weights=weights)))
        model.length_groups = 1
        texts = ("input_ids", "attention_mask", "labels", "image_of_text")
        expected = sum(
            float(weight)
            * float(model(images=batch["images"], **{name: batch[name][row : row + 1] for name in texts}))
            for row, weight in enumerate(weights)
        )
    assert found == pytest.approx([expected] * 2, rel=1e-4)


def test_one_model_predicts_captions_and_answers(world, tmp_path):
    from finetune.predict import predict

    Finetuner(recipe(world, tmp_path / "run", steps=3)).train()
    for name, question, key in (("c", None, "caption"), ("a", "what colour is it?", "answer")):
        out = tmp_path / f"{name}.jsonl"
        predict(
            model=tmp_path / "run", images=(str(world / "val"),), out=out, question=question, device="cpu"
        )
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(lines) == 12
        assert all(key in line for line in lines)


def test_few_bits_need_a_gpu_and_adapters(world, tmp_path):
    language_model = {"kind": "pretrained", "name": str(world / "lm"), "bits": 4}
    with pytest.raises(ValueError, match=r"bits 4: matrices of so few bits cannot train: set lora\.rank"):
        recipe(world, tmp_path / "run", language_model=language_model)
    chosen = recipe(world, tmp_path / "run", language_model=language_model, lora={"rank": 2})
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match=r"language_model\.bits 4 needs a CUDA GPU .* this run is on cpu"
        ):
            Finetuner(chosen)
        assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_over_few_bits_train_and_come_back(world, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    language_model = {"kind": "pretrained", "name": str(world / "lm"), "bits": bits}
    Finetuner(recipe(world, tmp_path / "run", language_model=language_model, lora={"rank": 2})).train()
    model = load_task_model(tmp_path / "run")
    layers = {type(layer).__name__ for layer in model.language_model.modules()}
    assert layers & {"Linear4bit", "Linear8bitLt"}

"""Teachers whose embeddings lie in the shards: written, read, and equal to teachers that run beside the student."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from data.faults import Fault
from data.pairs import PairLoad, Told, stack_told
from data.samples import RawSample, index_shards, read_sample
from data.shards import Sample, ShardWriter
from data.stored import Stored, settings_of, unpack
from data.stream import pair_stream
from data.tar import ShardReader
from data.transforms import EvalTransform, TrainTransform, decode_image
from pretrain.checkpoint import complete_checkpoints
from pretrain.cli import main
from pretrain.encoder import build_encoder, load_encoder
from pretrain.inputs import input_names
from pretrain.network import DualEncoder
from pretrain.objectives import build_objective
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_loss import DistillationConfig
from pretrain.recipe_model import TowersModel
from pretrain.reinforce import read_teachers, reinforce
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
AUGMENTED = {"crop_scale": (0.5, 1.0), "hflip": 0.5, "color_jitter": 0.2}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, tiny_models):
    """Two teachers: one of the student's size, one for smaller pictures and shorter texts."""
    folder = tmp_path_factory.mktemp("teachers")
    same = tiny_models["vit"]
    other = {
        **same,
        "embed_dim": 24,
        "image_tower": {**same["image_tower"], "image_size": 16},
        "text_tower": {**same["text_tower"], "context_length": 6},
    }
    for seed, (name, model) in enumerate({"same": same, "other": other}.items()):
        torch.manual_seed(seed + 5)
        build_encoder(TowersModel.model_validate(model), device="cpu").save(folder / name)
    return {name: str(folder / name) for name in ("same", "other")}


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory, tiny_shards, teachers):
    """The tiny shards with three views of both teachers."""
    out = tmp_path_factory.mktemp("reinforced")
    words = [f"{name}={model}" for name, model in teachers.items()]
    told = reinforce(
        (str(tiny_shards),), teachers=tuple(words), out=out, views=3, batch_size=12, quiet=True, **AUGMENTED
    )
    assert told == {"samples": 40, "left_out": 0}
    return out


def samples_of(folder, more=()):
    """All samples of a folder of shards, by key."""
    found = {}
    for index in index_shards(str(folder)):
        with ShardReader() as reader:
            for number in range(len(index)):
                raw = read_sample(index, number, number, reader, more)
                found[raw.key] = raw
    return found


def test_every_sample_has_its_teachers_rows_of_the_views_that_training_draws(
    reinforced, tiny_shards, teachers
):
    before = samples_of(tiny_shards)
    after = samples_of(reinforced, ["same.safetensors", "other.safetensors"])
    assert before.keys() == after.keys()
    for key, raw in list(after.items())[::13]:
        assert (raw.image, raw.record, raw.text) == (before[key].image, before[key].record, before[key].text)
        seeds = []
        for name, model in teachers.items():
            encoder = load_encoder(model, device="cpu")
            stored = unpack(raw.members[f"{name}.safetensors"], name, captions=2)
            transform = TrainTransform(encoder.image_size, scale=(0.5, 1.0), hflip=0.5, color_jitter=0.2)
            assert np.array_equal(stored.settings, settings_of(transform))
            pixels = decode_image(raw.image)
            views = torch.stack(
                [transform(pixels, np.random.default_rng(int(seed))) for seed in stored.seeds]
            )
            assert len({view.numpy().tobytes() for view in views}) == 3
            rows = encoder.encode_images(views).numpy(), encoder.encode_texts(raw.captions()).numpy()
            np.testing.assert_allclose(stored.images, rows[0], atol=1e-3)
            np.testing.assert_allclose(stored.texts, rows[1], atol=1e-3)
            assert stored.logit_scale == pytest.approx(1 / 0.07)
            seeds.append(stored.seeds.tolist())
        assert seeds[0] == seeds[1]
    manifest = json.loads((reinforced / "manifest.json").read_text())
    assert manifest["samples"] == 40


def recipe_of(tiny_recipe, data, **loss):
    content = tiny_recipe(loss={"kind": "distillation", **loss}, steps=4)
    content["data"] = {"train": str(data), "workers": 0, **AUGMENTED}
    return content


def test_stored_and_online_teachers_have_the_same_loss(tiny_recipe, reinforced, teachers):
    """To what float16 rounds, on the same pictures: those of the stream."""
    recipe = PretrainRecipe.model_validate(recipe_of(tiny_recipe, reinforced, stored=["same"], weight=0.7))
    trainer = Trainer(recipe)
    assert input_names(recipe) == ("images", "tokens", "same.image", "same.text", "same.scale")
    online = build_objective(DistillationConfig(teachers=(teachers["same"],), weight=0.7), trainer.encoder)
    network, teacher = DualEncoder(trainer.encoder), load_encoder(teachers["same"], device="cpu")
    for batch in trainer.stream.iterate(0, 7):  # into a second epoch, which draws other views and captions
        inputs = [batch[name] for name in trainer.inputs]
        said = teacher.encode_images(inputs[0]), teacher.encode_texts(inputs[1])
        for column, rows in zip(inputs[2:4], said, strict=True):
            torch.testing.assert_close(column, rows, rtol=0, atol=3e-4)
            apart = (
                (rows[:, None] - rows[None]).abs().amax(2)
            )  # of other pictures and captions: far more than that
            assert float(apart.fill_diagonal_(1).min()) > 3e-3
        losses, gradients = [], []
        for objective, given in ((trainer.objective, inputs), (online, inputs[:2])):
            loss = objective(network(*given), *given)
            loss.backward()
            losses.append(loss.detach())
            gradients.append(network.model.visual.proj.grad.clone())
            network.zero_grad()
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
        torch.testing.assert_close(*gradients, rtol=0, atol=float(gradients[1].norm()) * 2e-3)


def test_several_teachers_train_in_parts_and_resume_the_same(
    tiny_recipe, fresh_accelerate, reinforced, teachers, tmp_path
):
    loss = {"stored": ["same", "other"], "teachers": [teachers["same"]], "shares": [1, 2, 3]}
    ends = []
    for name, micro_batch, resume in (("a", None, False), ("a", None, True), ("b", 3, False)):
        fresh_accelerate()
        content = recipe_of(tiny_recipe, reinforced, **loss)
        content |= {"run": str(tmp_path / name), "micro_batch": micro_batch}
        trainer = Trainer(PretrainRecipe.model_validate(content), resume=resume)
        if not resume:
            trainer.check_gradients()
        trainer.train()
        ends.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
        shutil.rmtree(complete_checkpoints(tmp_path / name / "checkpoints")[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    apart = sum(float((ends[0][name] - ends[2][name]).double().square().sum()) for name in ends[0]) ** 0.5
    assert apart < 2e-3


def test_a_missing_embedding_is_one_error_before_anything_starts(
    tiny_recipe, tiny_shards, reinforced, tmp_path
):
    recipe = recipe_of(tiny_recipe, reinforced, stored=["nobody"])
    with pytest.raises(ValueError, match="stored teacher 'nobody' for 40 of 40 samples"):
        Trainer(PretrainRecipe.model_validate(recipe))
    mixed = tmp_path / "mixed"
    shutil.copytree(reinforced, mixed)
    shutil.copy(tiny_shards / "00001.tar", mixed / "00001.tar")
    options = {
        "transform": TrainTransform((32, 32)),
        "tokenize": lambda texts: torch.zeros(len(texts), 3),
        "batch_size": 4,
    }
    with pytest.raises(ValueError, match=r"for 15 of 40 samples \(first '0015' in .*00001.tar\)"):
        pair_stream(str(mixed), stored=["same"], **options)


def test_what_the_teacher_did_not_see_is_refused(tiny_recipe, reinforced):
    content = recipe_of(tiny_recipe, reinforced, stored=["same"])
    content["data"]["hflip"] = 0.0
    trainer = Trainer(PretrainRecipe.model_validate(content))
    with pytest.raises(ValueError, match=r"another augmentation \(hflip 0.5, here 0\): set data.crop_scale"):
        trainer.train()
    for wrong in ({"transform": EvalTransform((32, 32))}, {"word_dropout": 0.1}, {"captions": "all"}):
        options = {"transform": TrainTransform((32, 32)), **wrong}
        with pytest.raises(ValueError, match="saw single whole captions"):
            PairLoad(**options, stored=("same",))


def test_damaged_members_and_changed_captions_are_bad_samples(reinforced):
    raw = next(iter(samples_of(reinforced, ["same.safetensors"]).values()))
    content = raw.members["same.safetensors"]
    load = PairLoad(TrainTransform((32, 32), scale=(0.5, 1.0), hflip=0.5, color_jitter=0.2), stored=("same",))
    assert load(raw, np.random.default_rng(0)).told["same"].image.shape == (16,)
    stored = unpack(content, "same", 2)
    other = Stored(stored.images[:1], stored.texts, 1.0, 1, stored.seeds, stored.settings).pack()
    for packed, captions, said in (
        (content[:50], 2, "is damaged"),
        (content, 3, "has 2 texts for 3 captions"),
        (other, 2, "as many seeds as views"),
    ):
        with pytest.raises(Fault, match=said):
            unpack(packed, "same", captions)
    with pytest.raises(Fault, match=r"no KEY.same.safetensors"):
        load(RawSample("k", "s", 0, raw.image, "jpg", {"caption": "a"}), np.random.default_rng(0))
    moved = Stored(stored.images, stored.texts, 1.0, 1, stored.seeds + 1, stored.settings).pack()
    both = PairLoad(load.transform, stored=("same", "moved"))
    members = {"same.safetensors": raw.members["same.safetensors"], "moved.safetensors": moved}
    with pytest.raises(Fault, match="saw different views"):
        both(RawSample("k", "s", 0, raw.image, "jpg", raw.record, None, members), np.random.default_rng(0))
    with pytest.raises(ValueError, match="of different models"):
        stack_told("same", [Told(torch.zeros(3), torch.zeros(3), 1.0, model) for model in (1, 2)])


def test_the_command_goes_on_where_it_was_and_keeps_to_its_settings(
    tiny_shards, teachers, reinforced, tmp_path, capsys, monkeypatch
):
    words = [
        str(tiny_shards),
        "--teachers",
        f"same={teachers['same']}",
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    assert main(["reinforce", *words, "--views", "2"]) == 0
    assert "loss.stored: [same]" in capsys.readouterr().out
    out = tmp_path / "out"
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["shards"]["00001.tar"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "00001.tar").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert main(["reinforce", *words, "--views", "2"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()}.keys() == whole.keys()
    assert all((out / name).read_bytes() == whole[name] for name in ("00000.tar", "00001.tar", "00002.tar"))
    assert all((out / name).stat().st_mtime_ns == then for name, then in times.items())
    with pytest.raises(ValueError, match="begun with other teachers, views or augmentation"):
        main(["reinforce", *words, "--views", "3"])
    assert main(["reinforce", *words, "--views", "1", "--overwrite"]) == 0
    options = {"teachers": (f"same={teachers['same']}",), "quiet": True}
    with pytest.raises(ValueError, match="is where the shards lie"):
        reinforce((str(tiny_shards),), out=tiny_shards, **options)
    with pytest.raises(ValueError, match="two shards of one name"):
        reinforce((str(tiny_shards), str(reinforced)), out=tmp_path / "two", **options)
    with pytest.raises(ValueError, match="views, batch_size and workers of at least 1"):
        reinforce((str(tiny_shards),), out=tmp_path / "two", views=0, **options)
    shutil.copytree(tiny_shards, tmp_path / "others")
    with pytest.raises(ValueError, match="holds other shards"):
        reinforce((str(tiny_shards),), out=tmp_path / "others", **options)


def test_samples_that_cannot_be_used_are_left_out_and_counted(tmp_path, teachers, make_picture):
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(6):
            content = make_picture(number) if number else b"no picture"
            writer.write(Sample(f"{number}", content, "jpg", ["a thing"] if number != 1 else []))
    options = {"teachers": (f"same={teachers['same']}",), "quiet": True, "views": 1}
    told = reinforce((str(tmp_path / "shards"),), out=tmp_path / "out", max_faults=0.5, **options)
    assert told == {"samples": 4, "left_out": 2}
    assert [*samples_of(tmp_path / "out")] == ["2", "3", "4", "5"]
    for _ in range(2):  # what was left out counts for the call that goes on, too
        with pytest.raises(ValueError, match="2 of 6 samples cannot be used"):
            reinforce((str(tmp_path / "shards"),), out=tmp_path / "strict", **options)
    assert reinforce((str(tmp_path / "shards"),), out=tmp_path / "out", max_faults=0.5, **options) == told


def test_other_shards_of_the_same_name_are_not_taken_for_done(tmp_path, teachers, make_picture):
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name) as writer:
            writer.write(Sample(name, make_picture(0), "jpg", ["a thing"]))
    options = {"teachers": (f"same={teachers['same']}",), "quiet": True, "views": 1, "out": tmp_path / "out"}
    reinforce((str(tmp_path / "one"),), **options)
    with pytest.raises(
        ValueError, match=r"00000\.tar in .*out is the copy of .*one.00000\.tar, not of .*two"
    ):
        reinforce((str(tmp_path / "two"),), **options)
    assert [*samples_of(tmp_path / "out")] == ["one"]
    assert reinforce((str(tmp_path / "two"),), overwrite=True, **options) == {"samples": 1, "left_out": 0}
    assert [*samples_of(tmp_path / "out")] == ["two"]


@pytest.mark.parametrize("word", ["same", "=x", "Same=x", "a.b=x", "a="])
def test_teachers_are_named_for_files(word):
    with pytest.raises(ValueError, match="expected NAME=MODEL"):
        read_teachers([word])


def test_the_recipe_wants_teachers_once_and_a_share_for_each():
    for content, said in (
        ({}, "expected a teacher"),
        ({"stored": ["a", "a"]}, "named twice"),
        ({"stored": ["a", "b"], "shares": [1]}, "a share for each of 2 teachers"),
    ):
        with pytest.raises(ValueError, match=said):
            DistillationConfig.model_validate(content)
    with pytest.raises(ValueError, match="at least one NAME=MODEL"):
        read_teachers([])

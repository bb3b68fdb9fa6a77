"""`pairstream data curate` from shards to shards: what stays, what the report says, and kills."""

import csv
import gzip
import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.check import check_shards
from data.cli import main
from data.curate import command
from data.curate.command import run
from data.curate.recipe import CurateRecipe
from data.samples import index_shards, read_sample
from data.shards import Sample, ShardWriter
from data.tar import ShardReader
from pairstream.recipe import dump_recipe, load_recipe, recipe_names, validate
from pairstream.report import Report


def detailed(seed: int, size=(96, 80), quality: int = 90) -> bytes:
    grid = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return jpeg(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC), quality)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def pair(key: str, image: bytes, *captions: str, **meta) -> Sample:
    return Sample(key, image, "jpg", captions or (f"a picture called {key}",), meta)


@pytest.fixture(scope="session")
def web(tmp_path_factory) -> Path:
    """Four shards of 25 samples: 80 that are fine, and the planted faults and copies of `GONE`."""
    folder = tmp_path_factory.mktemp("web")
    fine = [
        pair(f"fine{n:02d}", detailed(n), punsafe=0.1, url=f"http://a.example/{n}.jpg") for n in range(80)
    ]
    mirrored = ImageOps.mirror(Image.open(io.BytesIO(detailed(2))))
    bad = [
        pair("small", detailed(101, (20, 90)), punsafe=0.1, url="http://a.example/"),
        pair("long", detailed(102, (400, 90)), punsafe=0.1, url="http://a.example/"),
        pair("silent", detailed(103), "x", punsafe=0.1, url="http://a.example/"),
        pair("mail", detailed(104), "write to a@example.com now", punsafe=0.1, url="http://a.example/"),
        pair("unsafe", detailed(105), punsafe=0.9, url="http://a.example/"),
        pair("nowhere", detailed(106), punsafe=0.1, url="http://cdn.bad.example/"),
        pair("unknown", detailed(107), url="http://a.example/"),
        pair("same", detailed(0), "the same bytes again", punsafe=0.1, url="http://a.example/"),
        pair("recoded", detailed(1, quality=30), punsafe=0.1, url="http://a.example/"),
        pair("mirror", jpeg(mirrored), punsafe=0.1, url="http://a.example/"),
        pair("larger", detailed(3, (192, 160)), punsafe=0.1, url="http://a.example/"),
        pair("leaked", detailed(200), punsafe=0.1, url="http://a.example/"),
        pair("two", detailed(108), "ok caption", "y", punsafe=0.1, url="http://a.example/"),
        pair("broken", detailed(109)[:900], punsafe=0.1, url="http://a.example/"),
    ]
    more = [pair(f"more{n}", detailed(300 + n), punsafe=0.1, url="http://a.example/") for n in range(6)]
    order = np.random.default_rng(0).permutation(100)
    samples = [*fine, *bad, *more]
    with ShardWriter(folder / "train", samples_per_shard=25) as writer:
        for place in order:
            writer.write(samples[place])
    with ShardWriter(folder / "test") as writer:
        writer.write(pair("held_out", detailed(200, quality=60)))
        writer.write(pair("other", detailed(201)))
    return folder


GONE = {
    "broken": "unusable", "small": "image_size", "long": "aspect_ratio", "silent": "word_count",
    "mail": "text_patterns", "unsafe": "punsafe", "unknown": "missing_metadata", "nowhere": "url_domains",
    "leaked": "leak", "same": "duplicate_exact", "recoded": "duplicate_perceptual",
    "mirror": "duplicate_perceptual", "fine03": "duplicate_perceptual",
}  # fmt: skip
FILTERS = [
    {"kind": "image_size", "min_side": 32},
    {"kind": "aspect_ratio", "max": 3},
    {"kind": "word_count", "min": 2},
    {"kind": "text_patterns"},
    {"kind": "punsafe"},
    {"kind": "url_domains", "block": ["bad.example"]},
]


@pytest.fixture
def recipe(web: Path, tmp_path: Path):
    """`recipe(**keys) -> CurateRecipe` of the set above."""

    def make(**keys) -> CurateRecipe:
        content = {
            "shards": str(web / "train"),
            "out": str(tmp_path / "out"),
            "filters": FILTERS,
            "duplicates": {"plant": 0.2},
            "leaks": {"shards": str(web / "test")},
            "samples_per_shard": 30,
            "max_faults": 0.1,
        }
        return validate(CurateRecipe, {**content, **keys}, "test")

    return make


def keys_in(folder: Path) -> list[str]:
    return [index.key(row) for index in index_shards(folder) for row in range(len(index))]


def dropped(folder: Path) -> dict[str, list[str]]:
    rows = list(csv.reader(io.StringIO(gzip.decompress((folder / "dropped.csv.gz").read_bytes()).decode())))
    assert rows[0] == ["shard", "key", "cause", "copy_of_shard", "copy_of_key", "detail"]
    return {row[1]: row for row in rows[1:]}


def test_what_stays_and_what_goes(recipe, web: Path, tmp_path: Path) -> None:
    metrics = run(recipe())
    out = tmp_path / "out"
    gone = dropped(out)
    # Of "fine00" and its copy "same" the first key stays, of "fine03" and the larger picture the larger one.
    assert {key: row[2] for key, row in gone.items()} == GONE
    assert set(keys_in(out)) == set(keys_in(web / "train")) - set(GONE)
    assert (gone["same"][4], gone["mirror"][4], gone["fine03"][4]) == ("fine00", "fine02", "larger")
    assert (gone["leaked"][4], gone["leaked"][5]) == ("held_out", "perceptual")
    assert gone["broken"][5] == "undecodable_image"
    found = check_shards(out)
    assert (found["samples"], found["faults"], found["manifest"]) == (100 - len(GONE), {}, True)
    assert [
        entry["samples"] for entry in json.loads((out / "manifest.json").read_text())["shards"].values()
    ] == [30, 30, 27]
    assert metrics["kept"] == 87
    assert metrics["dropped"]["duplicate_perceptual"] == 3
    assert metrics["leaks"] == {"samples": 1, "by": {"exact": 0, "perceptual": 1}, "evaluation_samples": 2,
                                "evaluation_samples_leaked": 1}  # fmt: skip
    assert sum(metrics["histograms"]["shorter side"]["before"]) == 99 + 1, (
        "the broken one's header can be read"
    )
    assert sum(metrics["histograms"]["shorter side"]["after"]) == 87
    assert not list(out.glob(".tmp-*"))


def test_samples_are_copied_byte_for_byte(recipe, web: Path, tmp_path: Path) -> None:
    run(recipe())

    def members(folder: Path) -> dict[str, bytes]:
        found = {}
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                found |= {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore
        return found

    before, after = members(web / "train"), members(tmp_path / "out")
    changed = {name for name, content in after.items() if before[name] != content}
    assert changed == {"two.json"}, "a caption of its two is gone"
    record = json.loads(after["two.json"])
    assert (record["caption"], record["captions"]) == ("ok caption", ["ok caption"])
    assert after["two.txt"] == b"ok caption"


def test_the_report(recipe, tmp_path: Path) -> None:
    metrics = run(recipe())
    report = Report.load(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    tables = [block for block in report.blocks if block["kind"] == "table"]
    rules = {row[0]: row[2] for row in tables[0]["rows"]}
    assert {cause: rules[cause] for cause in GONE.values()} == {
        cause: list(GONE.values()).count(cause) for cause in GONE.values()
    }
    assert rules["kept"] == 87
    for cause in ("image_size", "aspect_ratio", "word_count", "text_patterns", "missing_metadata"):
        (wall,) = (block for block in report.blocks if block["kind"] == "cards" and block["title"] == cause)
        assert len(wall["cards"]) == 1
        assert wall["cards"][0]["image"].startswith("data:image/jpeg")
    (hidden,) = (
        block for block in report.blocks if block.get("title") == "punsafe" and block["kind"] == "cards"
    )
    assert hidden["cards"][0]["image"] is None, "nobody wants to meet it"
    groups = [entry for block in report.blocks if block["kind"] == "results" for entry in block["entries"]]
    assert len(groups) == 4 + 1  # four pictures with copies, one that leaked
    assert {block["title"] for block in report.blocks if block["kind"] == "curves"} >= {
        "shorter side",
        "caption words",
    }
    assert "http" not in page.replace("http-equiv", "")
    planted = {(row["kind"], row["method"]): row for row in metrics["planted"]}
    assert planted["same bytes", "exact"]["recall"] == 1
    assert planted["encoded again", "exact"]["recall"] == 0
    for kind in ("encoded again", "resized", "mirrored"):
        assert planted[kind, "perceptual"]["recall"] > 0.9
        assert planted[kind, "any"]["precision"] > 0.9
    assert planted["encoded again", "any"]["planted"] > 10


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_run_goes_on_to_the_same_files(recipe, tmp_path: Path, monkeypatch, seed: int) -> None:
    """Dies at random writes, as a kill would: nothing is cleaned up."""
    whole = recipe(out=str(tmp_path / "whole"))
    run(whole)
    rng = np.random.default_rng(seed)
    real, left = Path.replace, 0

    def replace(path: Path, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    kills = 0
    for _ in range(30):
        left = int(rng.integers(5, 14))
        try:
            run(recipe())
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 2
    same_files(tmp_path / "whole", tmp_path / "out")


def same_files(whole: Path, other: Path) -> None:
    """Make sure that two folders hold the same; some files name their folder."""
    expected, found = contents(whole), contents(other)
    for each in (expected, found):
        for name in ("report.html", "report.json", "recipe.resolved.yaml", "_curate/plan.json"):
            del each[name]
    assert found == expected
    for name in ("report.html", "report.json"):
        assert (other / name).read_text() == (whole / name).read_text().replace(str(whole), str(other))


KILLED = """
import os, signal, sys
from pathlib import Path
import {module} as module
left, real = {after}, module.{name}
def die(*arguments, **options):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
module.{name} = die
from data.cli import main
main(["curate", sys.argv[1], "--quiet"])
"""


@pytest.mark.dist
@pytest.mark.parametrize(
    ("module", "name", "after"),
    [("data.curate.records", "write_bytes", 3), ("data.shards", "fsync_path", 2)],
    ids=["while shards are read", "while a shard is written"],
)
def test_kill_9_changes_nothing(recipe, tmp_path: Path, module: str, name: str, after: int) -> None:
    run(recipe(out=str(tmp_path / "whole")))
    made = recipe()
    dump_recipe(made, tmp_path / "my.yaml")
    code = KILLED.format(module=module, name=name, after=after)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "my.yaml")], check=False)
    assert done.returncode == -signal.SIGKILL
    out = tmp_path / "out"
    assert not (out / "metrics.json").exists()
    assert len(list((out / "_curate" / "looked").glob("*.npz"))) == (2 if after == 3 else 4)
    assert bool(list(out.glob(".tmp-*.tar-*"))) == (after == 2), "a half-written shard lies there"
    run(made)
    same_files(tmp_path / "whole", out)


def test_a_finished_run_is_left_alone(recipe, tmp_path: Path) -> None:
    first = run(recipe())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(recipe(processes=2)) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_the_order_of_shards_changes_nothing(recipe, web: Path, tmp_path: Path) -> None:
    names = sorted(map(str, (web / "train").glob("*.tar")))
    (tmp_path / "words.txt").write_text(
        "picture\nfine\ncalled\n" + "".join(f"fine{n:02d}\n" for n in range(30))
    )
    more = {"balance": {"entries": str(tmp_path / "words.txt"), "cap": 20}}
    run(recipe(shards=names, out=str(tmp_path / "a"), **more))
    run(recipe(shards=names[::-1], out=str(tmp_path / "b"), **more))
    assert set(keys_in(tmp_path / "a")) == set(keys_in(tmp_path / "b"))
    assert {key: row[1:] for key, row in dropped(tmp_path / "a").items()} == {
        key: row[1:] for key, row in dropped(tmp_path / "b").items()
    }


def test_several_processes_write_the_same(recipe, tmp_path: Path) -> None:
    run(recipe(out=str(tmp_path / "a")))
    run(recipe(out=str(tmp_path / "b"), processes=2))
    both = [
        {name: value for name, value in contents(tmp_path / which).items() if name.endswith(".tar")}
        for which in "ab"
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 3


@pytest.mark.slow
@pytest.mark.dist
def test_ray_writes_the_same(recipe, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    run(recipe(out=str(tmp_path / "a")))
    run(recipe(out=str(tmp_path / "b"), processes=2, distributor="ray"))
    both = [
        {name: value for name, value in contents(tmp_path / which).items() if name.endswith(".tar")}
        for which in "ab"
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 3
    bad = recipe(out=str(tmp_path / "c"), distributor="ray", max_faults=0.0)
    with pytest.raises(ValueError, match="the budget max_faults is 0"):
        run(bad)


class ToyEncoder:
    """Pictures by their mean colour in a 3 x 3 grid, texts by a direction that their first word picks."""

    def encode_images(self, images):
        opened = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        small = [np.asarray(image.resize((3, 3), Image.Resampling.BOX)).ravel() for image in opened]
        rows = np.array(small, dtype=np.float32) - 127
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_texts(self, texts):
        return self.encode_images([detailed(int(text.split()[-1].removeprefix("fine"))) for text in texts])


@pytest.fixture
def toy(monkeypatch) -> dict:
    module = types.ModuleType("toy_encoders")
    module.load, module.odd = ToyEncoder, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_encoders", module)
    return {"use": "toy_encoders:load", "batch_size": 7}


def test_scores_and_embeddings_come_from_any_encoder(recipe, toy, tmp_path: Path, web: Path) -> None:
    fits = [pair(f"fine{n:02d}", detailed(n), f"caption fine{n:02d}") for n in range(20)]
    unfit = [pair(f"odd{n}", detailed(50 + n), f"caption fine{n:02d}") for n in range(10)]
    cut = Image.open(io.BytesIO(detailed(4))).crop((2, 2, 94, 78))
    with ShardWriter(tmp_path / "set", samples_per_shard=8) as writer:
        for sample in [*fits, *unfit, pair("cut", jpeg(cut), "caption fine04")]:
            writer.write(sample)
    settings = {"shards": str(tmp_path / "set"), "encoder": toy, "leaks": None}
    score = [{"kind": "clip_score", "min": 0.7}]
    run(
        recipe(
            filters=score, duplicates={"perceptual": None, "semantic": {"min_similarity": 0.9}}, **settings
        )
    )
    gone = {key: row[2] for key, row in dropped(tmp_path / "out").items()}
    assert gone == {f"odd{n}": "clip_score" for n in range(10)} | {"cut": "duplicate_semantic"}
    metrics = run(
        recipe(
            filters=[{"kind": "clip_score", "top": 0.5}],
            duplicates=None,
            out=str(tmp_path / "top"),
            **settings,
        )
    )
    assert metrics["kept"] == 16
    assert set(keys_in(tmp_path / "top")) <= {*(f"fine{n:02d}" for n in range(20)), "cut"}
    other = {**settings, "leaks": {"shards": str(web / "test"), "semantic": {"min_similarity": 0.95}}}
    assert (
        run(recipe(filters=[], duplicates=None, out=str(tmp_path / "leaks"), **other))["leaks"]["by"][
            "semantic"
        ]
        == 0
    )


def test_encoders_that_are_none(recipe, toy) -> None:
    score = {"filters": [{"kind": "clip_score", "min": 0.9}]}
    with pytest.raises(ValueError, match=r"encoder.use 'toy_encoders:none' .*could not be made"):
        run(recipe(encoder={"use": "toy_encoders:none"}, **score))
    with pytest.raises(
        ValueError, match=r"'toy_encoders:odd': gives dict, without encode_images and encode_texts"
    ):
        run(recipe(encoder={"use": "toy_encoders:odd"}, **score))
    with pytest.raises(ValueError, match=r"'pretrain.encoder:load_encoder' with options .*could not be made"):
        run(recipe(encoder={"options": {"model": "no/such/run"}}, **score))


def test_the_balance_keeps_rare_words(recipe, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set") as writer:
        for n in range(300):
            word = "zebra" if n % 100 == 0 else "dog"
            writer.write(pair(f"{n:03d}", detailed(n % 7), f"a {word}", number=n))
        writer.write(pair("none", detailed(8), "a thing"))
    (tmp_path / "words.txt").write_text("dog\nzebra\nunicorn\n")
    settings = {"shards": str(tmp_path / "set"), "filters": [], "duplicates": None, "leaks": None}
    metrics = run(recipe(balance={"entries": str(tmp_path / "words.txt"), "cap": 60}, **settings))
    kept = keys_in(tmp_path / "out")
    zebras = [key for key in kept if int(key) % 100 == 0]
    assert len(zebras) == 3
    assert 40 <= len(kept) - 3 <= 82, "60 expected; three standard deviations"
    assert metrics["dropped"]["no_entry"] == 1
    assert metrics["balance"]["common"] == [["dog", 297, len(kept) - 3], ["zebra", 3, 3]]
    again = {"entries": str(tmp_path / "words.txt"), "cap": 60, "seed": 1, "unmatched": "keep"}
    run(recipe(balance=again, out=str(tmp_path / "seed"), **settings))
    assert set(keys_in(tmp_path / "seed")) - {"none"} != set(kept)
    assert "none" in keys_in(tmp_path / "seed")


def test_keys_that_several_shards_share(recipe, tmp_path: Path) -> None:
    for number in range(3):
        with ShardWriter(tmp_path / "set" / str(number)) as writer:
            writer.write(pair("a", detailed(number)))
            if number == 0:
                writer.write(pair("a-2", detailed(7)))
    run(recipe(shards=[str(tmp_path / "set" / str(n)) for n in range(3)], leaks=None, filters=[]))
    assert keys_in(tmp_path / "out") == ["a", "a-2", "a-3", "a-4"]
    (index,) = index_shards(tmp_path / "out")
    with ShardReader() as reader:
        assert [read_sample(index, row, row, reader).image for row in range(4)] == [
            detailed(seed) for seed in (0, 7, 1, 2)
        ]


def test_nothing_is_left(recipe, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nothing is left of 100 samples \(image_size 100.*report\.html shows examples"
    ):
        run(recipe(filters=[{"kind": "image_size", "min_side": 1000}]))
    assert (tmp_path / "out" / "report.html").is_file()
    assert not list((tmp_path / "out").glob("*.tar"))


def test_damage_past_the_budget(recipe, web: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 100 samples cannot be used .*budget max_faults is 0"):
        run(recipe(max_faults=0.005))
    assert run(recipe())["kept"] == 87, "and with a larger budget the same folder goes on"
    for number, path in enumerate(sorted((web / "train").glob("*.tar"))):
        content = path.read_bytes()
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / path.name).write_bytes(content[: len(content) // 2] if number == 1 else content)
    (tmp_path / "cut" / "99999.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"truncated_tar: 1"):
        run(recipe(shards=str(tmp_path / "cut"), max_faults=0.01, out=str(tmp_path / "other")))
    metrics = run(recipe(shards=str(tmp_path / "cut"), max_faults=0.5, out=str(tmp_path / "other")))
    assert metrics["faults"]["truncated_tar"] == metrics["faults"]["bad_shard"] == 1
    assert 80 <= metrics["samples"] < 100


def test_folders_that_are_taken(recipe, web: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="is the folder of the shards that come in"):
        run(recipe(out=str(web / "train")))
    out.write_text("a file")
    with pytest.raises(FileExistsError, match="out is a file: expected a folder"):
        run(recipe())
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("the only copy")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"holds other files than a curation \(thesis\.tex"):
            run(recipe(), overwrite=overwrite)
    (out / "thesis.tex").rename(out / "00000.tar")
    with pytest.raises(FileExistsError, match=r"holds 1 files already \(00000.tar .*--overwrite"):
        run(recipe())
    run(recipe(), overwrite=True)
    with pytest.raises(
        FileExistsError, match=r"holds a curation with samples_per_shard = 30, and now it is 31"
    ):
        run(recipe(samples_per_shard=31))
    run(recipe(samples_per_shard=31), overwrite=True)
    assert check_shards(out)["shards"] == 3
    with pytest.raises(FileExistsError, match=r"holds a curation with shards = "):
        run(recipe(samples_per_shard=31, shards=str(web / "train" / "00000.tar")))


def test_what_an_earlier_run_left_damaged(recipe, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    simple = {"filters": [{"kind": "image_size"}], "duplicates": None, "leaks": None}
    run(recipe(**simple))
    for name in ("metrics.json", "_curate/plan.json"):
        for content in ("{", "[]"):
            (out / name).write_text(content)
            with pytest.raises(ValueError, match=rf"{name} is damaged \(.*start anew with --overwrite"):
                run(recipe(**simple))
    (out / "_curate" / "plan.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a curation with other recipe"):
        run(recipe(**simple))
    with monkeypatch.context() as patch:
        patch.setattr(command, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe(**simple), overwrite=True)
    record = out / "_curate" / "looked" / "00001.npz"
    whole = record.read_bytes()
    for content in (whole[:200], b"", b"no archive"):
        record.write_bytes(content)
        with pytest.raises(ValueError, match=r"00001\.npz is damaged .*: remove it, and the same command"):
            run(recipe(**simple))
    record.unlink()
    assert run(recipe(**simple))["samples"] == 100


def test_an_evaluation_set_that_is_the_set_itself(recipe, web: Path) -> None:
    with pytest.raises(ValueError, match=r"leaks: shards: .*00001\.tar is one of the shards that come in"):
        run(recipe(leaks={"shards": str(web / "train" / "00001.tar")}))


def test_empty_shards_and_odd_json(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    with ShardWriter(folder) as writer:
        writer.write(pair("a", detailed(0), punsafe=1e300, similarity=10**400))
        writer.write(pair("b", detailed(1), punsafe=float("inf")))
    tarfile.open(folder / "empty.tar", "w").close()
    (folder / "zero.tar").write_bytes(b"")
    content = {"shards": str(folder), "out": str(tmp_path / "out"), "filters": [{"kind": "text_patterns"}]}
    with pytest.raises(ValueError, match=r"1 of 3 samples cannot be used(.|\n)*zero\.tar: is empty"):
        run(validate(CurateRecipe, {**content, "max_faults": 0.1}, "test"))
    metrics = run(validate(CurateRecipe, {**content, "max_faults": 0.5}, "test"))
    assert (metrics["samples"], metrics["kept"], metrics["faults"]) == (2, 2, {"bad_shard": 1})
    (folder / "00000.tar").unlink()
    (folder / "zero.tar").unlink()
    with pytest.raises(ValueError, match=r"nothing is left of 0 samples \(the shards hold none\)"):
        run(validate(CurateRecipe, {**content, "out": str(tmp_path / "none")}, "test"))


def test_one_process_at_a_time(recipe, tmp_path: Path) -> None:
    with command.alone(tmp_path / "out"), pytest.raises(ValueError, match="another process is at work on"):
        run(recipe())


def test_a_shard_that_changes_under_the_run(recipe, web: Path, tmp_path: Path, monkeypatch) -> None:
    import shutil

    shutil.copytree(web / "train", tmp_path / "set")
    real = command.settle

    def settle(*arguments):
        with ShardWriter(tmp_path / "set", overwrite=True) as writer:
            writer.write(pair("new", detailed(0)))
        for number in range(1, 4):
            shutil.copy(tmp_path / "set" / "00000.tar", tmp_path / "set" / f"{number:05d}.tar")
        return real(*arguments)

    monkeypatch.setattr(command, "settle", settle)
    with pytest.raises(ValueError, match=r"holds 1 samples now and had 25 when it was read: start anew"):
        run(recipe(shards=str(tmp_path / "set")))


def test_the_command(recipe, web: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "my.yaml").write_text(
        f"shards: {web / 'train'}\nout: {tmp_path / 'out'}\nfilters:\n- {{kind: image_size, min_side: 32}}\n"
    )
    assert main(["curate", str(tmp_path / "my.yaml"), "--samples-per-shard", "40"]) == 0
    said = capsys.readouterr().err
    assert "98 of 100 samples stay" not in said
    assert "99 of 100 samples stay (99.0%)" in said
    assert "image_size" in said
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    with pytest.raises(ValueError, match=r"which recipe\? One of curate_web"):
        main(["curate"])
    with pytest.raises(FileNotFoundError, match=r"no recipe 'curate_wed'.*did you mean 'curate_web'"):
        main(["curate", "curate_wed"])
    assert main(["curate", "--help"]) == 0
    assert "usage: pairstream data curate RECIPE [--KEY VALUE ...] [--overwrite]" in capsys.readouterr().out


@pytest.mark.parametrize("name", recipe_names("data"))
def test_recipes_parse_and_run(name: str, web: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("py3langid")
    monkeypatch.chdir(tmp_path)
    words = ["--shards", str(web / "train"), "--out", str(tmp_path / "out"), "--max-faults", "0.5"]
    made = load_recipe(CurateRecipe, "data", name, words)
    assert run(made)["kept"] > 0

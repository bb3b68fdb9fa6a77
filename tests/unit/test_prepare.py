"""`data.prepare`: what is written, what is skipped, and that nothing half-written remains."""

from __future__ import annotations

import errno
import inspect
import io
import json
import operator
import tarfile
import zlib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import prepare as prepare_module
from data.adapters.common import Counted, Skipped
from data.prepare import ADAPTERS, prepare
from data.shards import Sample, ShardWriter


def read_shards(folder: Path) -> dict[str, dict]:
    """Samples of a folder by key: their files, with the JSON read."""
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                file = tar.extractfile(member)
                assert file is not None
                content = file.read()
                value = json.loads(content) if extension == "json" else content
                found.setdefault(key, {})[extension] = value
    return found


def gif(size: tuple[int, int] = (20, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("P", size, 3).save(file, "GIF")
    return file.getvalue()


def bomb_png() -> bytes:
    """The header of a 30,000 x 30,000 picture."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """`use(items, total=None)`: make the set `toy` give these samples and skipped rows."""

    def install(items, total: int | None = None) -> None:
        rows = list(items)

        def samples(split: str = "train"):
            return Counted(len(rows) if total is None else total, iter(rows))

        monkeypatch.setattr(prepare_module, "toy_samples", samples, raising=False)
        monkeypatch.setitem(ADAPTERS, "toy", "data.prepare:toy_samples")

    return install


@pytest.fixture
def good(make_picture) -> list[Sample]:
    return [Sample(f"k{number}", make_picture(number), "jpg", [f"text {number}"]) for number in range(100)]


def test_every_adapter_exists_and_takes_only_options_of_prepare() -> None:
    options = inspect.signature(prepare).parameters
    for target in ADAPTERS.values():
        module, function = target.split(":")
        taken = inspect.signature(getattr(import_module(module), function)).parameters
        assert set(taken) <= {*options, "source"}, target  # `source` follows `hf:`


def test_writes_every_sample_and_counts(use, good, tmp_path: Path, capsys) -> None:
    asked = Sample("asked", good[0].image, "jpg", ["a", "b"], {"questions": [{"question_id": 1}] * 3})
    use([*good, asked])
    summary = prepare("toy", out=tmp_path / "out", samples_per_shard=30)
    written = read_shards(tmp_path / "out")
    assert list(written) == [sample.key for sample in good] + ["asked"]
    assert written["k7"]["jpg"] == good[7].image, "bytes are kept when no size is asked for"
    assert written["k7"]["txt"] == b"text 7"
    assert written["asked"]["json"]["captions"] == ["a", "b"]
    assert (summary.samples, summary.captions, summary.questions, summary.shards) == (101, 102, 3, 4)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == 101
    said = capsys.readouterr().err
    assert "101 samples, 102 captions, 3 questions in 4 shards; 0 rows skipped" in said
    assert "prepare toy: 101/101" in said


def test_quiet_says_nothing(use, good, tmp_path: Path, capsys) -> None:
    use(good)
    prepare("toy", out=tmp_path / "out", quiet=True)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_the_same_set_gives_the_same_bytes(use, good, tmp_path: Path) -> None:
    use(good)
    for name in "ab":
        prepare("toy", out=tmp_path / name, samples_per_shard=40, image_size=20, quiet=True)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_limit_stops_at_so_many_samples(use, good, tmp_path: Path) -> None:
    use([Skipped("bad_row", "list:1", "why"), *good])
    summary = prepare("toy", out=tmp_path / "out", limit=30, quiet=True)
    assert list(read_shards(tmp_path / "out")) == [f"k{number}" for number in range(30)]
    assert summary.skipped == {"bad_row": 1}


def test_bad_rows_are_named_counted_and_skipped(use, good, tmp_path: Path, capsys) -> None:
    bad = [
        Skipped("missing_image", "list.txt:12", "no picture x.jpg"),
        Sample("text", b"not a picture at all", "jpg", ["a"], {"name": "pretends.jpg"}),
        Sample("cut", good[0].image[:-300], "jpg", ["a"], {"url": "http://host/cut.jpg"}),
        Sample("bomb", bomb_png(), "png", ["a"]),
        good[3],
    ]
    use([*bad, *good])
    summary = prepare("toy", out=tmp_path / "out")
    assert summary.samples == 100
    assert summary.skipped == {
        "missing_image": 1,
        "undecodable_image": 2,
        "too_large_image": 1,
        "duplicate_key": 1,
    }
    assert "text" not in read_shards(tmp_path / "out")
    said = capsys.readouterr().err
    assert "missing_image 1: list.txt:12: no picture x.jpg" in said
    assert "pretends.jpg: not a picture (20 bytes)" in said
    assert "http://host/cut.jpg: " in said
    assert "bomb: more than 50,000,000 pixels" in said
    assert "another sample has the key 'k3'" in said


def test_only_the_first_examples_of_a_cause_are_shown(use, good, tmp_path: Path) -> None:
    use([*[Skipped("bad_row", f"f:{line}", "why") for line in range(5)], *good])
    lines = prepare("toy", out=tmp_path / "out", quiet=True).lines_of_faults()
    assert lines == ["  bad_row 5: f:0: why; f:1: why; f:2: why ..."]


@pytest.mark.parametrize("known", [True, False])
def test_stops_past_the_share_of_bad_rows(use, good, tmp_path: Path, known: bool) -> None:
    use([*good[:94], *[Skipped("bad_row", f"f:{line}", "why") for line in range(6)]], None if known else 0)
    with pytest.raises(ValueError, match=r"toy: 6 of 100 rows are bad.*\n  bad_row 6: f:0: why"):
        prepare("toy", out=tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []
    assert prepare("toy", out=tmp_path / "out", max_faults=0.06, quiet=True).samples == 94


def test_stops_as_soon_as_the_share_is_certain_to_be_passed(use, good, tmp_path: Path) -> None:
    taken = []

    def rows():
        for number in range(1000):
            taken.append(number)
            yield Skipped("bad_row", f"f:{number}", "why")

    use([])
    prepare_module.toy_samples = lambda: Counted(1000, rows())  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="51 of 51 rows are bad"):
        prepare("toy", out=tmp_path / "out", quiet=True)
    assert len(taken) == 51


def test_no_fault_is_allowed_at_zero(use, good, tmp_path: Path) -> None:
    use([*good, Skipped("bad_row", "f:1", "why")])
    with pytest.raises(ValueError, match=r"more than --max-faults 0 allows"):
        prepare("toy", out=tmp_path / "out", max_faults=0, quiet=True)


def test_no_sample_at_all_is_an_error(use, tmp_path: Path) -> None:
    use([])
    with pytest.raises(ValueError, match=r"toy gave no sample, so nothing was written"):
        prepare("toy", out=tmp_path / "out", quiet=True)
    use([Skipped("bad_row", "f:1", "why")])
    with pytest.raises(ValueError, match=r"gave no sample.*\n  bad_row 1: f:1: why"):
        prepare("toy", out=tmp_path / "out", max_faults=1, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_shards_and_nothing_else(
    use, good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(good)
    prepare("toy", out=tmp_path / "out", quiet=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write = ShardWriter.write

    def fails_late(self: ShardWriter, sample: Sample) -> None:
        if sample.key == "k50":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, sample)

    monkeypatch.setattr(ShardWriter, "write", fails_late)
    with pytest.raises(OSError, match="No space left"):
        prepare("toy", out=tmp_path / "out", samples_per_shard=20, overwrite=True, quiet=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_is_replaced_only_when_asked(use, good, tmp_path: Path) -> None:
    use(good)
    out = tmp_path / "out"
    prepare("toy", out=out, samples_per_shard=20, quiet=True)
    with pytest.raises(FileExistsError, match=r"holds 6 files of shards already.*--overwrite"):
        prepare("toy", out=out, quiet=True)
    prepare("toy", out=out, overwrite=True, quiet=True)
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "manifest.json"]


def test_a_folder_with_other_files_is_never_replaced(use, good, tmp_path: Path) -> None:
    use(good)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"other files than shards \(thesis.txt"):
        prepare("toy", out=tmp_path, overwrite=True, quiet=True)
    with pytest.raises(FileExistsError, match=r"thesis.txt is a file: expected a folder"):
        prepare("toy", out=tmp_path / "thesis.txt", quiet=True)
    with pytest.raises(ValueError, match=r"--out .*thesis.txt/out: no file can be written in .*thesis.txt"):
        prepare("toy", out=tmp_path / "thesis.txt/out", quiet=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_linked_folder_is_filled_where_it_is(use, good, tmp_path: Path) -> None:
    use(good)
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big_disk")
    prepare("toy", out=tmp_path / "link", quiet=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big_disk" / "00000.tar").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"--image-size must be at least 1 pixel, got 0"),
        ({"limit": 0}, r"--limit must be at least 1 sample, got 0"),
        ({"max_faults": 1.5}, r"--max-faults is a share between 0 and 1, got 1.5"),
        ({"samples_per_shard": 0}, r"samples_per_shard must be at least 1, got 0"),
        ({"table": Path("x.csv")}, r"toy takes no --table: its options are --split"),
    ],
)
def test_impossible_options(use, good, tmp_path: Path, options: dict, message: str) -> None:
    use(good)
    with pytest.raises(ValueError, match=message):
        prepare("toy", out=tmp_path / "out", quiet=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_set_and_missing_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no data set 'flicker8k'.*did you mean 'flickr8k'"):
        prepare("flicker8k", out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"coco needs --root"):
        prepare("coco", out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"csv takes no --split"):
        prepare("csv", out=tmp_path / "out", table=Path("x.csv"), split="val")
    with pytest.raises(ValueError, match=r"scenes draws at any --size"):
        prepare("scenes", out=tmp_path / "out", image_size=64)


def test_pictures_are_shrunk_to_the_shorter_side(use, make_picture, tmp_path: Path) -> None:
    pictures = {
        "wide": make_picture(0, (400, 200)),
        "tall": make_picture(1, (90, 300)),
        "small": make_picture(2, (60, 300)),
        "lossless": make_picture(3, (128, 128), "PNG"),
        "webp": make_picture(4, (640, 200), "WEBP"),
    }
    meta = {"width": 400, "height": 200}
    use([Sample(key, image, "jpg", ["a"], meta if key == "wide" else {}) for key, image in pictures.items()])
    prepare("toy", out=tmp_path / "out", image_size=64, quiet=True)
    written = read_shards(tmp_path / "out")

    def opened(key: str, extension: str) -> Image.Image:
        return Image.open(io.BytesIO(written[key][extension]))

    assert opened("wide", "jpg").size == (128, 64)
    assert (written["wide"]["json"]["width"], written["wide"]["json"]["height"]) == (128, 64)
    assert opened("tall", "jpg").size == (64, 213)
    assert written["small"]["jpg"] == pictures["small"], "a picture is never enlarged"
    assert (opened("lossless", "png").format, opened("lossless", "png").size) == ("PNG", (64, 64))
    assert (opened("webp", "png").format, opened("webp", "png").size) == ("PNG", (205, 64))
    expected = Image.open(io.BytesIO(pictures["wide"])).resize((128, 64), Image.Resampling.BICUBIC)
    difference = np.asarray(opened("wide", "jpg"), float) - np.asarray(expected, float)
    assert np.abs(difference).mean() < 2


def test_a_turned_photograph_stands_upright_when_shrunk(use, tmp_path: Path) -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, :100] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the left half comes to lie on top
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    use([Sample("turned", file.getvalue(), "jpg", ["a"])])
    prepare("toy", out=tmp_path / "out", image_size=50, quiet=True)
    image = Image.open(io.BytesIO(read_shards(tmp_path / "out")["turned"]["jpg"]))
    assert image.size == (50, 100)
    top, bottom = image.getpixel((25, 20)), image.getpixel((25, 80))
    assert top[0] > 200 > 50 > bottom[0]  # type: ignore[index]


def test_the_extension_is_that_of_the_bytes(use, make_picture, tmp_path: Path) -> None:
    use(
        [
            Sample("png", make_picture(0, format="PNG"), "jpg", ["a"]),
            Sample("webp", make_picture(0, format="WEBP"), "png", ["a"]),
            Sample("gif", gif(), "jpg", ["a"]),
        ]
    )
    prepare("toy", out=tmp_path / "out", quiet=True)
    written = read_shards(tmp_path / "out")
    assert set(written["png"]) == {"png", "txt", "json"}
    assert set(written["webp"]) == {"webp", "txt", "json"}
    assert Image.open(io.BytesIO(written["gif"]["png"])).size == (20, 10)


def test_grey_and_cmyk_and_alpha_pictures_become_rgb_when_shrunk(use, tmp_path: Path) -> None:
    samples = []
    for mode, format in (("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG")):
        file = io.BytesIO()
        Image.new(mode, (80, 80)).save(file, format)
        samples.append(Sample(mode.replace(";", ""), file.getvalue(), "jpg", ["a"]))
    use(samples)
    prepare("toy", out=tmp_path / "out", image_size=40, quiet=True)
    for files in read_shards(tmp_path / "out").values():
        image = Image.open(io.BytesIO(files.get("jpg") or files["png"]))
        assert (image.mode, image.size) == ("RGB", (40, 40))


def test_counted_tells_its_length() -> None:
    assert operator.length_hint(Counted(7, [])) == 7

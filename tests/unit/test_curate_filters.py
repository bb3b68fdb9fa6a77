"""Each filter keeps what it should and drops what it should."""

import hashlib

import numpy as np
import pytest

from data.curate.filters import Facts, Rules, domain_of, has_email, has_phone, is_below
from data.curate.hashes import grey_of, hash_greys
from data.curate.recipe import CurateRecipe
from data.pictures import Picture
from pairstream.recipe import validate


def rules(*filters: dict) -> Rules:
    recipe = validate(CurateRecipe, {"shards": "a", "out": "b", "filters": list(filters)}, "test")
    return Rules(recipe.filters, recipe.labels())


def judge(rule: dict, image: bytes = b"", captions=("a caption",), **record) -> str | None:
    return rules(rule).judge(Facts(image, list(captions), record))


@pytest.mark.parametrize(
    ("rule", "size", "kept"),
    [
        ({"kind": "image_size", "min_side": 40}, (40, 90), True),
        ({"kind": "image_size", "min_side": 41}, (40, 90), False),
        ({"kind": "image_size", "max_side": 90}, (40, 90), True),
        ({"kind": "image_size", "max_side": 89}, (40, 90), False),
        ({"kind": "aspect_ratio", "max": 3}, (90, 30), True),
        ({"kind": "aspect_ratio", "max": 3}, (30, 91), False),
    ],
)
def test_size_and_shape(make_picture, rule: dict, size, kept: bool) -> None:
    assert judge(rule, make_picture(0, size)) == (None if kept else rule["kind"])


@pytest.mark.parametrize(
    ("rule", "caption", "kept"),
    [
        ({"kind": "caption_length", "min": 5, "max": 7}, "abcde", True),
        ({"kind": "caption_length", "min": 5, "max": 7}, "abcd", False),
        ({"kind": "caption_length", "min": 5, "max": 7}, "abcdefgh", False),
        ({"kind": "word_count", "min": 2, "max": 3}, "two  words", True),
        ({"kind": "word_count", "min": 2, "max": 3}, "one", False),
        ({"kind": "word_count", "min": 2, "max": 3}, "one two three four", False),
        ({"kind": "text_patterns"}, "a dog on a beach, 2021", True),
        ({"kind": "text_patterns"}, "write to jo.doe+x@mail.example.co.uk", False),
        ({"kind": "text_patterns", "find": ["email"]}, "call +49 30 901820", True),
        ({"kind": "text_patterns", "find": [], "regexes": [r"stock\s*photo"]}, "a stock photo", False),
    ],
)
def test_captions(rule: dict, caption: str, kept: bool) -> None:
    assert judge(rule, captions=[caption]) == (None if kept else rule["kind"])


def test_languages() -> None:
    pytest.importorskip("py3langid")
    rule = {"kind": "language", "allow": ["en"]}
    assert judge(rule, captions=["a brown dog is running on the beach"]) is None
    assert judge(rule, captions=["ein brauner Hund rennt am Strand entlang"]) == "language"
    assert judge(rule, captions=["犬が浜辺を走っている"]) == "language"
    assert judge(rule, captions=["IMG_2034"]) is None, "what is in doubt stays"
    assert judge({**rule, "certainty": 0}, captions=["IMG_2034"]) == "language"
    assert judge({"kind": "language", "allow": ["en", "de"]}, captions=["ein brauner Hund am Strand"]) is None


@pytest.mark.parametrize(
    "text",
    ["mail me at someone@example.com", "jane [at] example.org", "A.B-c_d@sub.example.museum now"],
)
def test_emails_are_found(text: str) -> None:
    assert has_email(text)


@pytest.mark.parametrize(
    "text", ["follow us @ nike.com", "@someone", "a cat at the door", "5 @ 3.50 each", "a@b"]
)
def test_what_is_no_email(text: str) -> None:
    assert not has_email(text)


@pytest.mark.parametrize(
    "text",
    ["call +49 30 901820 now", "+1 (555) 234-5678", "(555) 234-5678", "555-234-5678", "555.234.5678",
     "tel. 030 1234567", "555 234 5678", "0171/1234567"],
)  # fmt: skip
def test_phone_numbers_are_found(text: str) -> None:
    assert has_phone(text)


@pytest.mark.parametrize(
    "text",
    ["12.05.2019", "2019-05-12", "05/12/2019", "1920 x 1080", "IMG_20190512_123456", "$1,234,567.00", "10:30:15",
     "isbn 9783161484100", "lot of 1000 2000 3000", "1939-1945", "http://a.example/555-234-5678"],
)  # fmt: skip
def test_what_is_no_phone_number(text: str) -> None:
    assert not has_phone(text)


def test_a_failing_caption_goes_and_the_sample_stays() -> None:
    facts = Facts(b"", ["ok caption", "x", "mail a@example.com"], {})
    assert rules({"kind": "word_count", "min": 2}, {"kind": "text_patterns"}).judge(facts) is None
    assert facts.captions == ["ok caption"]


def test_a_sample_without_captions() -> None:
    assert judge({"kind": "text_patterns"}, captions=[]) is None
    assert judge({"kind": "word_count"}, captions=[]) == "word_count"


@pytest.mark.parametrize("kind", ["punsafe", "pwatermark"])
def test_probabilities(kind: str) -> None:
    rule = {"kind": kind, "max": 0.5}
    assert judge(rule, **{kind: 0.5}) is None
    assert judge(rule, **{kind: 0.51}) == kind
    for absent in ({}, {kind: None}, {kind: "0.1"}, {kind: float("nan")}, {kind: True}):
        assert judge(rule, **absent) == "missing_metadata"
        assert judge({**rule, "missing": "keep"}, **absent) is None


def test_similarity() -> None:
    assert judge({"kind": "similarity", "min": 0.28}, similarity=0.28) is None
    assert judge({"kind": "similarity", "min": 0.28}, similarity=0.27) == "similarity"
    assert judge({"kind": "similarity", "top": 0.5}) == "missing_metadata"


def test_domains(tmp_path) -> None:
    (tmp_path / "list.txt").write_text("# a comment\nBad.example  # why\nhttps://worse.example/x\n\n")
    rule = {"kind": "url_domains", "block": ["bücher.example"], "files": [str(tmp_path / "list.txt")]}
    for blocked in ("http://bad.example/1.jpg", "https://img.cdn.BAD.example:8080/1.jpg", "http://www.worse.example",
                    "http://xn--bcher-kva.example/a", "http://user@bad.example./a"):  # fmt: skip
        assert judge(rule, url=blocked) == "url_domains", blocked
    for fine in ("http://notbad.example/bad.example", "http://example/", "http://[broken"):
        assert judge(rule, url=fine) is None, fine
    assert judge(rule) == judge(rule, url=7) == "missing_metadata"
    assert domain_of("www.example.com") == "example.com"
    assert not is_below("", {"example.com"})


def test_listed_pictures(make_picture, tmp_path) -> None:
    one, two, three = (make_picture(seed, (96, 96)) for seed in range(3))
    looks = int(hash_greys([grey_of(Picture(two))]).hashes[0])
    path = tmp_path / "hashes.txt"
    path.write_text(f"{hashlib.sha256(one).hexdigest().upper()}\n{looks ^ 0b1011:016x}\n")
    rule = {"kind": "picture_hashes", "files": [str(path)], "max_distance": 3}
    assert [judge(rule, image) for image in (one, two, three)] == ["picture_hashes", "picture_hashes", None]
    assert judge({**rule, "max_distance": 2}, two) is None


def test_the_first_rule_that_fails_is_named(make_picture) -> None:
    both = [
        {"kind": "word_count", "min": 5},
        {"kind": "image_size", "min_side": 100},
        {"kind": "word_count", "min": 2},
    ]
    assert rules(*both).judge(Facts(make_picture(0), ["one"], {})) == "word_count"
    assert rules(*both[1:]).judge(Facts(make_picture(0), ["one"], {})) == "image_size"
    recipe = validate(CurateRecipe, {"shards": "a", "out": "b", "filters": both}, "test")
    assert recipe.labels() == ["word_count", "image_size", "word_count_2"]


def test_lists_that_are_no_lists(tmp_path) -> None:
    rule = {"kind": "url_domains", "files": [str(tmp_path / "list.txt")]}
    with pytest.raises(ValueError, match=r"url_domains: cannot read the list .*list\.txt"):
        rules(rule)
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"list\.txt lists nothing; expected one entry a line"):
        rules(rule)
    (tmp_path / "list.txt").write_text("0123456789abcdeg\n")
    with pytest.raises(ValueError, match=r"has '0123456789abcdeg'; expected 64 hexadecimal digits"):
        rules({"kind": "picture_hashes", "files": [str(tmp_path / "list.txt")]})


@pytest.mark.parametrize("entry", ["", "  ", "http://[bad", "https://"])
def test_entries_that_name_no_domain(tmp_path, entry: str) -> None:
    with pytest.raises(
        ValueError, match=r"url_domains: block has .*, which names no domain: expected one such as"
    ):
        rules({"kind": "url_domains", "block": ["a.com", entry]})
    listed = tmp_path / "list.txt"
    listed.write_text("a.com\nhttps://\n")
    with pytest.raises(ValueError, match=r"list\.txt has 'https://', which names no domain"):
        rules({"kind": "url_domains", "files": [str(listed)]})


def test_numbers_that_are_none() -> None:
    rule = {"kind": "punsafe", "max": 0.5}
    assert judge(rule, punsafe=True) == judge(rule, punsafe=10**400) == judge(rule, punsafe=float("nan"))
    assert judge(rule, punsafe=10**400) == "missing_metadata"
    assert judge(rule, punsafe=float("inf")) == "punsafe"


def test_an_unknown_language() -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(ValueError, match=r"language: allow has 'english'; py3langid knows .*en"):
        rules({"kind": "language", "allow": ["english"]})


def test_a_missing_identifier(monkeypatch) -> None:
    import sys

    from data.curate.filters import identifier

    identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ImportError, match=r"the language filter needs .* pip install 'pairstream\[curate\]'"):
        rules({"kind": "language", "allow": ["en"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": [{"kind": "image_sise"}]}, "image_sise"),
        ({"filters": [{"kind": "image_size", "min_sid": 3}]}, r"filters\.0\.min_sid: unknown key; did you mean 'min"),
        ({"filters": [{"kind": "word_count", "min": 5, "max": 4}]}, r"max \(4\) is below min \(5\): nothing would"),
        ({"filters": [{"kind": "url_domains"}]}, "give the domains in block, or files of them"),
        ({"filters": [{"min_side": 3}]}, r"filters\.0: no kind, which says what .*keys \['min_side'\]"),
        ({"filters": {"kind": "image_size"}}, r"filters: Input should be a list"),
        ({"filters": ["image_size"]}, r"filters\.0: Input should be a valid dictionary.*got 'image_size'"),
        ({"filters": [{"kind": "image_size", "min_side": 9, "max_side": 8}]}, r"max_side \(8\) is below min_side"),
        ({"filters": [{"kind": "image_size", "min_side": "big"}]}, r"filters\.0\.min_side: .*valid integer.*got 'big'"),
        ({"filters": [{"kind": "punsafe", "max": 1.5}]}, r"filters\.0\.max: .*less than or equal to 1 \(got 1\.5\)"),
        ({"filters": [{"kind": "similarity", "min": 2}]}, r"filters\.0\.min: .*less than or equal to 1 \(got 2\)"),
        ({"filters": [{"kind": "similarity", "min": float("nan")}]}, r"filters\.0\.min: .*\(got nan\)"),
        ({"filters": [{"kind": "clip_score", "top": 0}]}, r"filters\.0\.top: .*greater than 0 \(got 0\)"),
        ({"filters": [{"kind": "language", "allow": "en"}]}, r"filters\.0\.allow: Input should be a list \(got 'en'\)"),
        ({"filters": [{"kind": "text_patterns", "find": []}]}, r"give patterns in find \(email, phone\) or regexes"),
        ({"duplicates": {"perceptual": {"max_distance": 40}}}, r"duplicates\.perceptual\.max_distance: .*got 40"),
        ({"balance": {"cap": 3}}, r"balance\.entries: Field required"),
        ({"duplicates": {}, "out": ""}, r"out: .*at least 1 character"),
        ({"filters": [{"kind": "similarity"}]}, r"give min \(a threshold\) or top"),
        ({"filters": [{"kind": "clip_score", "min": 0.2}]}, r"clip_score needs an encoder: add `encoder:"),
        ({"filters": [{"kind": "text_patterns", "regexes": ["("]}]}, r"'\(' is not a regular expression"),
        ({"duplicates": {"semantic": {}}}, r"duplicates\.semantic needs an encoder"),
        ({"duplicates": {"exact": False, "perceptual": None}}, "exact, perceptual and semantic are all off"),
        ({}, "nothing to do: give filters, duplicates, leaks or balance"),
        ({"duplicates": {}, "cluster": "auto"}, "cluster is the address of a Ray cluster: add distributor: ray"),
        ({"duplicates": {}, "encoder": {"use": "nothing"}}, "expected an import string such as 'pretrain.encoder:load"),
    ],
)  # fmt: skip
def test_faults_of_a_recipe(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(CurateRecipe, {"shards": "a", "out": "b", **changes}, "the recipe")


def test_greys_are_upright_and_small(make_picture) -> None:
    grey = grey_of(Picture(make_picture(3, (640, 480))))
    assert grey.shape == (32, 32)
    assert grey.dtype == np.float32

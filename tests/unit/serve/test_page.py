"""The page in a real Chromium: by mouse and by keyboard, with nothing from the network."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from serve.app import content_policy, create_app
from serve.keys import Keys

PAGE = Path(__file__).parents[3] / "serve/page.html"


def test_the_page_needs_nothing_from_elsewhere():
    text = PAGE.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text  # what models and files say is text and never markup
    policy = content_policy(text)
    assert policy.count("sha256-") == 2
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine: `apt-get install chromium`")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    found, problems = context.new_page(), []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda message: message.type == "error" and problems.append(message.text))
    found.set_default_timeout(20_000)
    yield found
    context.close()
    allowed = ("status of 401", "status of 4")
    assert not [problem for problem in problems if not any(text in problem for text in allowed)]


def until(page, condition: str) -> None:
    """Wait from here: the page's policy forbids Playwright to evaluate a string inside it again and again."""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


@pytest.mark.browser
def test_search_by_words_and_work_with_a_picture(live, page, models, make_picture, tmp_path):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{live.port}/")
    page.wait_for_selector("#search-part:not([hidden])")
    assert models.identity.fingerprint[:8] in page.inner_text("#identity")
    page.fill("#words", "thing 3")
    page.press("#words", "Enter")
    until(page, "document.querySelectorAll('#found img').length == 12")
    until(page, "[...document.querySelectorAll('#found img')].every((i) => i.naturalWidth > 0)")
    path = tmp_path / "mine.png"
    path.write_bytes(make_picture(5, (200, 150), "PNG"))
    page.set_input_files("#file", path)
    page.wait_for_selector("#bars li")
    assert page.locator("#bars li").count() == 5
    shares = [float(text.split()[0]) for text in page.locator("#bars .share").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.5)
    expected = models.captioner[0].caption([path.read_bytes()])[0]
    until(page, "!document.querySelector('#caption').innerText.includes('will stand here')")
    assert page.text_content("#caption") == (expected or "(the model wrote nothing)")
    page.fill("#question", "Is there a dog?")
    page.press("#question", "Enter")
    page.wait_for_selector("#answer:not(:empty)")
    page.wait_for_selector("#verdict li")
    page.fill("#post", "two blue dogs")
    page.press("#post", "Enter")
    expected = models.classifier[0].classify([path.read_bytes()], ["two blue dogs"])[0]
    best = f"{100 * max(expected.values()):.1f} %"
    until(page, f"document.querySelector('#verdict .share')?.innerText == '{best}'")
    page.click("#similar")
    page.wait_for_selector("#neighbours img")
    page.click("#fitting")
    page.wait_for_selector("#neighbours .texts li")
    until(page, "[...document.querySelectorAll('#neighbours img')].every((i) => i.naturalWidth > 0)")
    page.click("#found li:nth-child(2) button")  # a result becomes the picture to start from
    until(page, "document.querySelector('#file-name').innerText.startsWith('Picture 0')")
    page.wait_for_selector("#bars li")
    assert all(url.startswith((f"http://127.0.0.1:{live.port}/", "data:", "blob:")) for url in asked)


@pytest.mark.browser
def test_heatmaps_beside_the_picture_and_coloured_words(live, page, make_picture, tmp_path):
    page.goto(f"http://127.0.0.1:{live.port}/")
    page.wait_for_selector("#why-tool:not([hidden])", state="attached")
    path = tmp_path / "mine.png"
    path.write_bytes(make_picture(5, (64, 64), "PNG"))
    page.set_input_files("#file", path)
    page.wait_for_selector("#bars li")
    options = "[...document.querySelectorAll('#why-of option')].map((o) => o.value)"
    assert page.evaluate(options) == ["text", "caption", "answer", "label"]
    page.select_option("#why-method", "occlusion")
    page.fill("#why-text", "a red cat <b>")
    page.press("#why-text", "Enter")
    page.wait_for_selector("#why figure")
    alts = page.locator("#why img").evaluate_all("(all) => all.map((i) => i.alt)")
    assert len(alts) == 2
    assert alts[0] == "The picture as model sees it"
    assert alts[1].startswith("Heatmap: ")
    until(page, "[...document.querySelectorAll('#why img')].every((i) => i.naturalWidth == 320)")
    # the colour of a word is said in words as well
    words = page.locator("#why .words li").all_text_contents()
    assert [text.split(" (")[0] for text in words] == ["a", "red", "cat", "<b>"]
    assert any("100 %" in text for text in words)
    assert page.locator("#why .wash[aria-hidden=true]").count() == 4
    page.focus("#why summary")
    page.keyboard.press("Enter")
    assert page.locator("#why tbody tr").count() == 4
    page.select_option("#why-of", "caption")
    page.fill("#why-text", "two blue dogs")
    page.press("#why-text", "Enter")
    page.wait_for_selector("#why .maps li:nth-child(4)")
    assert page.locator("#why figcaption b").all_text_contents() == ["picture", "two", "blue", "dogs"]
    page.select_option("#why-of", "answer")
    page.fill("#why-text", "")
    page.press("#why-text", "Enter")  # the form itself asks for a question
    assert page.locator("#why .maps").count() == 1
    page.select_option("#why-of", "label")
    page.press("#why-text", "Enter")
    until(page, "document.querySelector('#why .said')?.innerText.includes('%')")
    assert page.inner_text("#problem") == ""


@pytest.mark.browser
def test_a_dropped_picture_and_one_that_is_none(live, page, make_picture):
    page.goto(f"http://127.0.0.1:{live.port}/")
    page.wait_for_selector("#picture-part:not([hidden])")
    drop = """([content, type]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(content)], "dropped", {type}));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
    }"""
    page.evaluate(drop, [list(b"not a picture"), "text/plain"])
    assert "no JPEG, PNG or WebP" in page.inner_text("#problem")
    page.evaluate(drop, [list(b"not a picture"), "image/png"])
    until(page, "document.querySelector('#problem').innerText.includes('whole picture')")
    page.evaluate(drop, [list(make_picture(2, (64, 64), "PNG")), "image/png"])
    page.wait_for_selector("#bars li")
    assert page.inner_text("#problem") == ""
    nothing = "document.querySelector('#caption').innerText == 'No caption for this picture.'"
    until(page, f"!({nothing})")
    page.evaluate(drop, [list(b"not a picture"), "image/png"])
    until(page, nothing)  # and not that of the picture before
    assert page.locator("#bars li").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1200])
def test_narrow_screens_and_problems_far_down(live, page, make_picture, tmp_path, width):
    page.set_viewport_size({"width": width, "height": 600})
    page.goto(f"http://127.0.0.1:{live.port}/")
    page.wait_for_selector("#picture-part:not([hidden])")
    path = tmp_path / "mine.png"
    path.write_bytes(make_picture(5, (64, 64), "PNG"))
    page.set_input_files("#file", path)
    page.wait_for_selector("#bars li")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for form in ("#search-form", "#label-form"):  # the button stands beside its field
        field, button = (page.locator(f"{form} {tag}").bounding_box() for tag in ("input", "button"))
        assert button["y"] < field["y"] + field["height"]
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(page, "scrollY > 300")
    path = tmp_path / "notes.txt"
    path.write_text("no picture")
    page.set_input_files("#file", path)
    page.wait_for_selector("#problem:not(:empty)")
    box = page.locator("#problem").bounding_box()
    assert 0 <= box["y"] < 600 - box["height"], "the problem is out of sight"


@pytest.mark.browser
def test_the_keyboard_reaches_everything_and_everything_has_a_name(live, page, make_picture, tmp_path):
    page.goto(f"http://127.0.0.1:{live.port}/")
    page.wait_for_selector("#picture-part:not([hidden])")
    path = tmp_path / "mine.png"
    path.write_bytes(make_picture(5, (64, 64), "PNG"))
    page.set_input_files("#file", path)
    page.wait_for_selector("#bars li")
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
        )
    for wanted in (
        "words",
        "Search",
        "file",
        "question",
        "Ask",
        "labels",
        "Compare",
        "post",
        "Judge",
        "why-of",
        "why-method",
        "why-text",
        "Explain",
        "similar",
        "fitting",
    ):
        assert wanted in reached, wanted
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input, select, button, img, section')].filter((e) => !e.closest('[hidden]'))
        .filter((e) => !(e.labels?.length || e.textContent.trim() || e.alt || e.getAttribute('aria-labelledby')))
        .map((e) => e.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.browser
def test_a_key_is_asked_for_and_used(models, run_app, page):
    with run_app(create_app(models, keys=Keys(["0123456789abcdef"]))) as live:
        page.goto(f"http://127.0.0.1:{live.port}/")
        page.wait_for_selector("#key-part:not([hidden])")
        page.fill("#key", "0123456789abcdef")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-part:not([hidden])")
        page.fill("#words", "thing")
        page.press("#words", "Enter")
        until(page, "[...document.querySelectorAll('#found img')].every((i) => i.naturalWidth > 0)")
        page.goto("about:blank")

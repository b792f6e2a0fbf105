"""The page of the local server in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from local_server import Paced, picture, serving

pytest.importorskip("fastapi", reason="needs nemo-bard[serve]")
pytest.importorskip("uvicorn", reason="needs nemo-bard[serve]")
pytest.importorskip("prometheus_client", reason="needs nemo-bard[serve]")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def paced(start):
    from nemo_bard.evaluation.responder import load_checkpoint

    model, processor = load_checkpoint(start, device="cpu")
    return Paced(model), processor


@pytest.fixture(scope="module")
def address(paced):
    with serving(*paced, max_tokens=64, api_key="s3cret") as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    """The page with its key given, and no error in its scripts."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    found, errors, foreign = context.new_page(), [], []
    found.set_default_timeout(15_000)
    found.on("pageerror", lambda error: errors.append(error))
    found.on("request", lambda request: foreign.append(request.url))
    found.goto(address)
    found.locator("#error", has_text="wants its API key").wait_for()
    found.fill("#key", "s3cret")
    found.press("#key", "Tab")
    found.wait_for_selector("#s-temperature")
    yield found
    assert not errors
    assert not [url for url in foreign if not url.startswith((address, "data:"))]
    context.close()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    picture(1).save(path)
    return path


def test_an_image_is_asked_about_with_the_keyboard_and_its_denoising_seen(page, image, paced):
    model, _ = paced
    page.set_input_files("#files", image)
    page.locator("#images img").wait_for()
    page.focus("#question")
    page.keyboard.type("Read the digits.")
    page.fill("#s-denoising_steps", "4")
    page.select_option("#s-remasking_strategy", "low_confidence_static")
    page.fill("#s-max_tokens", "12")
    page.select_option("#pace", "0")
    model.gate.clear()
    page.keyboard.press("Control+Enter")
    page.locator("#status", has_text=re.compile("waiting|decoding")).wait_for()
    model.gate.set()
    model.seconds = 0.15
    page.wait_for_selector(".token.draft")
    assert page.locator(".token").count() % 4 == 0
    page.locator("#status", has_text="done").wait_for()
    model.seconds = 0.0
    assert page.inner_text("#n-tokens") == "12"
    assert page.inner_text("#n-forwards") == "12"
    assert page.inner_text("#n-tpf") == "1.00"
    assert float(page.inner_text("#n-tps")) > 0
    assert page.locator(".token").count() == 12
    assert page.locator(".token.draft").count() == 0
    page.focus("#slider")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#step") == "Forward 1 of 12: block 1, step 1, 1 token fixed"
    assert page.locator(".token.draft").count() == 3
    assert page.inner_text("#text").count("\u2592") == 3


def test_stop_ends_the_answer_in_the_server_too(page, paced):
    model, _ = paced
    page.fill("#question", "one two three")
    page.fill("#s-max_tokens", "64")
    page.fill("#s-denoising_steps", "4")
    page.select_option("#s-remasking_strategy", "low_confidence_static")
    model.seconds, before = 0.1, model.steps
    page.click("#go")
    page.wait_for_selector(".token")
    page.click("#stop")
    page.locator("#status", has_text="stopped").wait_for()
    page.wait_for_timeout(500)
    after = model.steps
    page.wait_for_timeout(300)
    model.seconds = 0.0
    assert model.steps == after < before + 40
    assert page.is_enabled("#go")


def test_errors_are_shown_and_go_again(page, tmp_path):
    page.fill("#question", "one")
    page.fill("#s-max_tokens", "65")
    page.click("#go")
    page.locator("#error", has_text="max_tokens must be at most 64").wait_for()
    page.click("#reset")
    page.fill("#s-max_tokens", "4")
    page.click("#go")
    page.locator("#status", has_text="done").wait_for()
    assert page.is_hidden("#error")
    (tmp_path / "a.txt").write_text("no image")
    page.set_input_files("#files", tmp_path / "a.txt")
    page.locator("#error", has_text="a.txt is no image").wait_for()


def test_a_dropped_image_is_taken_and_can_be_taken_away(page, image):
    import base64

    data = base64.b64encode(Path(image).read_bytes()).decode()
    page.evaluate_handle(
        """data => {
          const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
          transfer.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));
          document.getElementById('question').dispatchEvent(
            new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        data,
    )
    page.get_by_alt_text("Image 1: dropped.png").wait_for()
    page.get_by_label("Remove dropped.png").click()
    assert page.locator("#images img").count() == 0


def test_dark_and_light_differ_and_a_phone_needs_no_sideways_scrolling(page):
    background = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != light
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [1200, 850, 360])
def test_no_choice_is_cut_off(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.click("summary")
    cut = page.evaluate(
        """() => [...document.querySelectorAll('select')].flatMap(select => {
          const free = document.createElement('select');
          free.append(...[...select.options].map(option => option.cloneNode(true)));
          free.style.cssText = 'position: absolute; width: auto';
          free.style.font = getComputedStyle(select).font;
          document.body.append(free);
          const missing = free.offsetWidth - select.offsetWidth;
          free.remove();
          return missing > 8 ? [[select.id, missing]] : [];  // its padding may be wider
        })"""
    )
    assert not cut

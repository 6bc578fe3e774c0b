"""The page at `/` in a browser, in front of the real application and an engine that answers at once."""

import contextlib
import itertools
import math
import re
import shutil
import threading
import time
from dataclasses import replace

import pytest

from mythos_jax.model.halting import Halting
from mythos_jax.server.model import Defaults
from mythos_jax.serving.request import BusyError
from tests.server.reader import Reader, colours, contrast, letters, luminance
from tests.server.running import NAME, fake_service, running
from tests.serving.fake_engine import FakeEngine

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
if CHROMIUM is None:
    pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}", allow_module_level=True)

PHONE, DESK = (360, 740), (1280, 800)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(answer, ...): a page of a server whose model gives this answer. Whatever a test does, the page has no error
    and breaks no rule of its content security policy."""
    complaints = []

    def note(message):
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    def open_page(answer="", size=DESK, dark=False, chat=True, delay=0.0, state="ready", length=1024, **fields):
        service = fake_service(FakeEngine(delay=delay, max_length=length), **fields)
        service.engine.answer = lambda request: letters(service, answer)
        if not chat:
            service.model = replace(service.model, chat=None)
        server = cleanup.enter_context(running(service))
        service.state = state
        colours = {"color_scheme": "dark" if dark else "light"}
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **colours)
        cleanup.callback(context.close)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        reader = Reader(page, server)
        if state == "ready" and not service.key:
            reader.wait("#examples button")
        return reader

    with contextlib.ExitStack() as cleanup:
        yield open_page
    assert complaints == []


def test_an_answer_streams_in_the_colours_of_its_loops(visit):
    reader = visit("The sky scatters blue.\nSo it is. Really")
    reader.hears("Why?")
    assert reader.answer == "The sky scatters blue.\nSo it is. Really"
    (body,) = reader.asked
    assert body == {
        "model": NAME,
        "temperature": 0.7,
        "max_tokens": 256,
        "loops": 4,
        "halting": "latent:0.03",
        "messages": [{"role": "user", "content": "Why?"}],
        "logprobs": True,
        "top_logprobs": 5,
        "stream": True,
    }
    scale = colours(reader, "#legend i")
    assert colours(reader, ".token") == [scale[i % 4] for i in range(len(reader.answer))]
    assert reader.page.inner_text("#mean") == "2.5 of 4"
    assert reader.page.inner_text("#saved") == "38 %"  # of 10 times 1 + 2 + 3 + 4 loops
    assert "2.5 of 4 loops · 38 % saved" in reader.page.inner_text("article footer")
    assert reader.page.locator("#spark rect").count() == len(reader.answer)
    # What a screen reader says: sentences, each once.
    assert reader.run("document.getElementById('spoken').textContent") == reader.answer


@pytest.mark.parametrize("dark", [False, True])
def test_colours_are_ordered_and_text_is_readable_on_all_of_them(visit, dark):
    reader = visit("abcd", dark=dark)
    reader.hears("?")
    scale = colours(reader, "#legend i")
    steps = [luminance(colour) for colour in scale]
    assert steps == sorted(steps, reverse=not dark)
    assert all(contrast(a, b) > 1.1 for a, b in itertools.pairwise(scale))
    (back,), (ink,) = colours(reader, "body"), colours(reader, "body", "color")
    assert (luminance(back) < 0.1) == dark
    assert all(contrast(ink, colour) >= 4.5 for colour in scale)
    for quiet in ("article footer", "#numbers dt", "#facts", ".hint", "#clear", "output", "#why"):
        for colour in colours(reader, quiet, "color"):
            assert contrast(colour, back) >= 4.5, quiet
    (button,), (label,) = colours(reader, "#send"), colours(reader, "#send", "color")
    assert contrast(button, label) >= 4.5


def test_the_card_of_a_token(visit):
    reader = visit("a b\u00e9")
    reader.hears("?")
    card = reader.page.locator("#card")
    reader.page.hover(".token >> nth=2")
    card.wait_for()
    text = card.inner_text()
    assert "3 of 4" in text
    assert f"{math.exp(-0.5):.0%}".replace("%", " %") in text
    assert card.locator("li").all_inner_texts()[0].split() == ["b", "61", "%"]
    assert card.locator("li").count() == 5
    reader.page.hover("#name")
    card.wait_for(state="hidden")
    # From the keyboard: one stop for Tab, arrows from token to token; the half character has no place of its own.
    reader.page.focus(".token >> nth=0")
    assert "1 of 4" in card.inner_text()
    for _ in range(3):
        reader.page.keyboard.press("ArrowRight")
    assert "é" in card.inner_text()
    assert reader.run("document.activeElement.getAttribute('aria-describedby')") == "card"
    reader.page.hover(".token >> nth=0")
    assert "é" in card.inner_text()  # it stays
    reader.page.keyboard.press("Escape")
    assert card.is_hidden()
    reader.page.click(".token >> nth=1")
    assert "2 of 4" in card.inner_text()
    reader.page.click("#name")
    assert card.is_hidden()


def test_stop_keeps_the_text_and_frees_the_place(visit):
    reader = visit("slowly " * 100)
    reader.server.engine.turns = threading.Semaphore(30)
    reader.ask("?")
    reader.wait(".token >> nth=20")
    reader.page.click("#stop")
    reader.ends()
    text = reader.answer
    assert "slowly slowly" in text
    assert len(text) < 700
    assert "stopped" in reader.page.inner_text("article footer")
    assert reader.run("document.activeElement.id") == "prompt"
    while not reader.server.engine.cancelled:  # up to pytest's limit
        time.sleep(0.01)
    reader.server.engine.turns = None
    # The page goes on, and what it has is part of the conversation.
    reader.server.engine.answer = lambda request: letters(reader.server.service, "fast")
    reader.hears("And now?")
    assert reader.answer == "fast"
    assert reader.asked[-1]["messages"] == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And now?"},
    ]
    reader.server.engine.answer = lambda request: letters(reader.server.service, "slowly " * 30)
    reader.server.engine.turns = threading.Semaphore(9)
    reader.ask("Again?")
    reader.wait("article:nth-of-type(3) .token >> nth=5")
    reader.server.engine.let(1000)
    reader.page.fill("#prompt", "Once more?")
    # At once: the end of the answer that was cleared comes after the beginning of the next one.
    reader.run("document.getElementById('clear').click(); document.getElementById('ask').requestSubmit()")
    reader.ends()
    assert len(reader.asked[-1]["messages"]) == 1
    assert reader.page.locator("article").count() == 1


def test_a_full_queue_is_told_and_can_be_tried_again(visit):
    reader = visit("yes")
    engine = reader.server.engine
    submit = engine.submit

    def refuse(request, listener):
        raise BusyError("the queue is full", retry_after=1.5)

    engine.submit = refuse
    reader.hears("?")
    assert reader.page.inner_text(".error") == "the queue is full (try again in 2 s)"
    assert reader.page.get_attribute(".error", "role") == "alert"
    engine.submit = submit
    reader.page.click("button:has-text('Try again')")
    reader.wait(".token")
    reader.ends()
    assert reader.answer == "yes"
    assert reader.page.locator(".error").count() == 0


def test_a_server_with_a_key(visit):
    reader = visit("yes", key="s3cret")
    for key in ("wrong", "s3cret"):
        reader.wait("#unlock:not([hidden])")
        assert "API key" in reader.page.inner_text("#status")
        reader.page.fill("#key", key)
        with reader.page.expect_response("**/v1/models"):
            reader.page.press("#key", "Enter")
    reader.wait("#examples button")
    assert reader.page.is_hidden("#unlock")
    reader.hears("?")
    assert reader.answer == "yes"
    assert reader.run("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_a_server_that_starts_and_one_that_is_gone(visit):
    reader = visit("yes", state="starting")
    reader.wait("#status:not(:empty)")
    assert "starting" in reader.page.inner_text("#status")
    assert reader.page.is_disabled("#send")
    reader.server.service.state = "ready"
    reader.wait("#examples button")
    assert reader.page.inner_text("#status") == ""
    engine = reader.server.engine
    engine.turns = threading.Semaphore(9)
    engine.answer = lambda request: letters(reader.server.service, "long " * 60)
    reader.ask("?")
    reader.wait(".token >> nth=3")
    engine.fail = RuntimeError("no memory")
    reader.ends()
    # The engine says it, or the server, which sees it too.
    assert re.fullmatch("the engine has failed: (RuntimeError: )?no memory", reader.page.inner_text(".error"))
    assert reader.answer.startswith("long")
    reader.server.thread.join()  # a server without an engine ends
    reader.hears("?")
    assert reader.page.locator(".error").last.inner_text() == "The server cannot be reached."
    reader.wait("#status:has-text('The server cannot be reached.')")  # it asks again, and is refused


def test_drafts_are_grey_until_they_are_confirmed_or_taken_back(visit):
    reader = visit("0123456789 final")
    reader.server.engine.turns = threading.Semaphore(0)
    reader.run(
        """() => {
            window.seen = { drafts: new Set(), gone: new Set(), styles: new Set() };
            new MutationObserver(() => {
                for (const draft of document.querySelectorAll(".draft:not(.gone .draft)")) {
                    const style = getComputedStyle(draft);
                    seen.drafts.add(draft.textContent);
                    seen.styles.add(`${style.fontStyle} ${style.color}`);
                }
                for (const gone of document.querySelectorAll(".gone .draft")) seen.gone.add(gone.textContent);
            }).observe(document.getElementById("talk"), { childList: true, subtree: true });
        }"""
    )
    reader.page.check("#provisional")
    reader.ask("?")
    for number in range(len("0123456789 final")):  # the page draws each step by itself
        reader.server.engine.let()
        reader.page.wait_for_selector(f".token >> nth={number}", state="attached")
    reader.ends()
    assert reader.asked[0]["provisional"] is True
    reader.page.wait_for_function("() => !document.querySelector('.draft, .gone')")  # what is withdrawn fades
    assert reader.answer == "0123456789 final"
    seen = reader.run("() => Object.fromEntries(Object.entries(seen).map(([name, values]) => [name, [...values]]))")
    assert {"2", "3", "5", "6"} <= set(seen["drafts"])  # the fake engine drafts every fifth token wrongly
    assert {"5", ":"} <= set(seen["gone"])
    assert "4" not in seen["drafts"]
    (style,) = seen["styles"]
    quiet = reader.run("getComputedStyle(document.querySelector('article footer')).color")
    assert style == f"italic {quiet}"
    assert "drafts kept" in reader.page.inner_text("#drafts")
    reader.page.hover(".token >> nth=4")
    assert "draft said\n5" in reader.page.inner_text("#card")
    reader.page.select_option("#halting", "kl")
    assert reader.page.is_disabled("#provisional")


def test_what_a_model_writes_is_never_markup(visit):
    evil = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>&amp;\n```\n<b>code</b>\n```\n"
    reader = visit(evil)
    reader.hears(evil)
    assert reader.answer == evil
    assert reader.page.locator(".question").evaluate("e => e.textContent") == evil
    reader.page.hover(".token >> nth=0")
    assert reader.run("document.querySelectorAll('main img, main script, main b, #card img').length") == 0
    assert reader.run("window.hacked") is None
    assert reader.page.locator(".answer code.block").evaluate("e => e.textContent") == "```\n<b>code</b>\n```\n"


def test_nothing_is_wider_than_a_phone(visit):
    reader = visit("a" * 90 + "\n```\n" + "b" * 90 + "\n```\n" + "word " * 40, PHONE)
    wide = "document.documentElement.scrollWidth > innerWidth || document.body.scrollHeight > innerHeight"
    assert not reader.run(wide)
    reader.hears("c" * 90)
    assert not reader.run(wide)
    reader.page.click("summary")
    assert reader.page.is_visible("#temperature")
    assert not reader.run(wide)
    assert not reader.run("[...document.querySelectorAll('main, #settings')].some(e => e.scrollWidth > e.clientWidth)")
    reader.page.click("summary")
    for place in (0, 40, 200):
        reader.page.locator(".token").nth(place).click()
        box = reader.page.locator("#card").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE[0]
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= PHONE[1]


def test_text_scrolls_only_for_a_reader_at_its_end(visit):
    reader = visit("line\n" * 100)
    reader.server.engine.turns = threading.Semaphore(300)
    left = "main.scrollHeight - main.scrollTop - main.clientHeight"
    at_end = f"() => {{ const main = document.querySelector('main'); return {left} < 40 }}"
    reader.ask("?")
    reader.page.wait_for_selector(".token >> nth=299", state="attached")
    reader.page.wait_for_function("() => document.querySelector('main').scrollTop > 0")
    reader.page.wait_for_function(at_end)
    reader.run("document.querySelector('main').scrollTop = 30")
    reader.server.engine.let(100)
    reader.page.wait_for_selector(".token >> nth=399", state="attached")
    reader.run("() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    assert reader.run("document.querySelector('main').scrollTop") == 30
    # Also if the answer ends before the browser says that somebody scrolled.
    reader.run("document.querySelector('main').scrollTop = 1e6")
    reader.page.wait_for_function(at_end)
    reader.run("document.querySelector('main').scrollTop = 30; document.getElementById('stop').click()")
    reader.ends()
    assert reader.run("document.querySelector('main').scrollTop") == 30


def test_a_model_without_chat_continues_the_text(visit):
    reader = visit(" upon a time", chat=False)
    assert reader.page.is_hidden("#system")
    reader.page.fill("#prompt", "Line")
    reader.page.press("#prompt", "Shift+Enter")
    reader.page.press("#prompt", "O")
    reader.hears("Line\nOnce")
    (body,) = reader.asked
    assert body["prompt"] == "Line\nOnce"
    assert body["logprobs"] == 5
    assert reader.answer == "Line\nOnce upon a time"


def test_settings_again_copy_and_clear(visit):
    reader = visit("yes")
    reader.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    reader.page.fill("#system", "Be brief.")
    reader.page.fill("#seed", "7")
    reader.page.fill("#limit", "20")
    reader.page.fill("#temperature", "0")
    reader.page.fill("#loops", "2")
    reader.hears("?")
    reader.page.select_option("#halting", "kl")
    reader.page.fill("#threshold", "1")
    reader.page.click("text=Regenerate")
    reader.ends()
    reader.page.select_option("#halting", "")
    reader.page.click("text=Regenerate")
    reader.ends()
    first, second, third = reader.asked
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    expected = {"seed": 7, "max_tokens": 20, "temperature": 0, "loops": 2, "halting": "latent:0.03"}
    assert {name: first[name] for name in expected} == expected
    assert second == first | {"halting": "kl:0.00001"}
    assert third == first | {"halting": None}
    assert reader.page.locator("article").count() == 1
    reader.run("window.setTimeout = () => 0")  # it stays
    reader.page.click("text=Copy")
    reader.page.wait_for_selector("text=Copied")
    assert reader.run("navigator.clipboard.readText()") == "yes"
    reader.page.click("#clear")
    assert reader.page.locator("article").count() == 0
    assert reader.page.is_visible("#empty")
    assert reader.page.inner_text("#mean") == "–"
    reader.page.click("#examples button >> nth=0")
    reader.ends()
    assert reader.asked[-1]["messages"][-1]["content"] == reader.page.inner_text(".question")


def test_the_settings_begin_as_the_server_was_started(visit):
    reader = visit("yes", defaults=Defaults(loops=3, halting=Halting("kl", 0.002)))
    reader.hears("?")
    assert {name: reader.asked[0][name] for name in ("loops", "halting")} == {"loops": 3, "halting": "kl:0.002"}


def test_a_conversation_that_is_too_long_loses_its_first_turns(visit):
    reader = visit("a" * 20, length=160)
    reader.page.fill("#limit", "20")
    for number in range(4):
        reader.hears(f"question {number}")
    assert not reader.page.locator(".error").count()
    said = [message["content"] for message in reader.asked[-1]["messages"]]
    assert said[-1] == "question 3"
    assert "question 0" not in said
    assert "no longer sees the first" in reader.page.locator("footer").last.inner_text()

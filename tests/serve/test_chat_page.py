"""The chat page in a real Chromium, at a real server: both answers as they come, by keyboard, and nothing from elsewhere."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import KEY, NAME

WIDE, PHONE = (1200, 800), (390, 800)
ENTER, ESCAPE, TAB = ("Enter", 13), ("Escape", 27), ("Tab", 9)
CTRL, CMD = 2, 4
TEXTS = "[...document.querySelectorAll('.turn:last-child .text')].map(place => place.textContent)"
BUSY = "document.querySelectorAll('[aria-busy]').length"
DONE = f"{BUSY} == 0 && !document.getElementById('send').disabled"


def start(browser, served, key: str = KEY, size: tuple[int, int] = WIDE, dark: bool = False) -> None:
    """Load the page anew, which another fragment alone would not."""
    browser.open(f"{served.address}/page.js", *size, dark, drawn="true")
    browser.js("sessionStorage.clear()")
    browser.open(f"{served.address}/#key={key}", *size, dark)


@pytest.fixture
def page(served, browser):
    """The page with its key, as the terminal's address opens it; nothing is kept of the tests before."""
    start(browser, served)
    yield browser
    assert browser.complaints == []
    assert {urlsplit(address).netloc for address in browser.requests} == {urlsplit(served.address).netloc}


def ask(page, question: str, tokens: int = 12, modifier: int = CTRL) -> None:
    page.js(f"document.getElementById('max-tokens').value = {tokens}")
    page.js("document.getElementById('prompt').focus()")
    page.type(question)
    page.press(*ENTER, modifiers=modifier)


def test_both_answers_come_at_the_same_time_and_are_those_of_the_models(page, served):
    assert page.js("document.activeElement.id") == "prompt"
    ask(page, "Tell me a long story about a fox.", tokens=40)
    page.wait_for(f"{BUSY} == 2 && {TEXTS}.length == 2 && {TEXTS}.every(text => text.length > 8)")
    early = page.js(TEXTS)
    page.wait_for(DONE)
    shown = page.js(TEXTS)
    assert all(
        text.startswith(part) and len(text) > len(part) for part, text in zip(early, shown, strict=True)
    )
    messages = [{"role": "user", "content": "Tell me a long story about a fox."}]
    for model, text in zip(("base", NAME), shown, strict=True):
        answer = served.client.chat.completions.create(
            model=model, messages=messages, max_tokens=40, temperature=0, seed=0
        )
        assert answer.choices[0].message.content == text
    heads = page.js("[...document.querySelectorAll('.turn h2')].map(head => head.textContent)")
    assert heads == ["base", NAME]
    facts = page.js("[...document.querySelectorAll('.turn .small')].map(place => place.textContent)")
    assert all("40 tokens · " in line and "tokens/s · cut at the most tokens" in line for line in facts)
    assert page.js("document.getElementById('prompt').value") == ""


def test_each_model_goes_on_with_its_own_conversation_until_a_new_one(page):
    page.js(
        "{ const real = window.fetch; window.asked = []; window.fetch = (path, options) => {"
        " window.asked.push(JSON.parse(options.body)); return real(path, options); }; true }"
    )
    page.js("document.getElementById('system').value = 'Be brief.'")
    ask(page, "Name a colour.")
    page.wait_for(DONE)
    first = page.js(TEXTS)
    ask(page, "And another.", modifier=CMD)
    page.wait_for(f"document.querySelectorAll('.turn').length == 2 && {DONE}")
    asked = page.js("window.asked")
    for text, request in zip(first, asked[2:], strict=True):
        assert [message["content"] for message in request["messages"]] == [
            "Be brief.",
            "Name a colour.",
            text,
            "And another.",
        ]
    page.js("document.getElementById('new').click()")
    assert page.js("document.querySelectorAll('.turn').length") == 0
    ask(page, "Name a colour.")
    page.wait_for(f"{DONE} && {TEXTS}.length == 2 && {TEXTS}.every(text => text)")
    assert page.js(TEXTS) == first


def test_escape_stops_both(page):
    ask(page, "Count from 1 to 1000.", tokens=400)
    page.wait_for(f"{TEXTS}.length == 2 && {TEXTS}.every(text => text)")
    page.press(*ESCAPE)
    page.wait_for(DONE)
    facts = page.js("[...document.querySelectorAll('.turn .small')].map(place => place.textContent)")
    assert [line.endswith("stopped") for line in facts] == [True, True]
    ask(page, "Hello", tokens=2)
    page.wait_for(f"document.querySelectorAll('.turn').length == 2 && {DONE}")


def test_what_is_asked_and_answered_is_text_never_html(page):
    ask(page, "Repeat: <img src=x onerror=alert(1)> <b>bold</b>", tokens=24)
    page.wait_for(f"{DONE} && {TEXTS}.length == 2")
    assert page.js("document.querySelector('.question').textContent").endswith("<b>bold</b>")
    assert page.js("document.querySelectorAll('.turn :is(img, b, script)').length") == 0


def test_the_key_leaves_the_address_and_stays_for_this_tab(page, served):
    assert page.js("location.href") == f"{served.address}/"
    page.open(served.address, *WIDE)
    usable = "document.getElementById('key-form').hidden && !document.getElementById('send').disabled"
    assert page.js(usable)
    page.js("location.hash = 'key=wrong'")  # an old address, put into this tab
    page.wait_for(f"!({usable})")
    page.js(f"location.hash = 'key={KEY}'")
    page.wait_for(usable)
    page.complaints.clear()  # of the 401


def test_all_can_be_reached_by_keyboard_and_has_a_name(page):
    names = []
    page.js("document.querySelector('details').open = true")
    page.js("document.getElementById('new').focus()")
    for _ in range(8):
        page.press(*TAB)
        names.append(page.js("document.activeElement.id || document.activeElement.tagName"))
    assert names == ["prompt", "send", "SUMMARY", "temperature", "seed", "max-tokens", "system", "BODY"]
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(field => !field.labels.length).length"
    assert page.js(unnamed) == 0


def test_a_number_that_cannot_be_is_said_in_words(page):
    page.js("document.getElementById('temperature').value = '-1'")
    ask(page, "Hello")
    problem = "document.getElementById('problem').textContent"
    assert page.js(problem) == "Temperature: expected a number from 0 to 5."
    assert page.js("document.querySelectorAll('.turn').length") == 0
    page.js("document.getElementById('temperature').value = '0'")
    page.press(*ENTER, modifiers=CTRL)
    page.wait_for(f"{DONE} && {TEXTS}.length == 2")
    assert page.js("document.getElementById('problem').hidden")


def test_without_a_key_it_asks_for_one(served, browser):
    """Chromium itself complains of each 401, and of nothing else."""
    start(browser, served, key="wrong")
    problem = "document.getElementById('problem').textContent"
    assert browser.js(problem).startswith("The key is missing or wrong.")
    assert browser.js("document.getElementById('send').disabled && document.activeElement.id") == "key"
    browser.type(KEY)
    browser.press(*ENTER)
    browser.wait_for("document.getElementById('key-form').hidden")
    assert browser.js("document.getElementById('problem').hidden && document.activeElement.id") == "prompt"
    assert all("401" in complaint for complaint in browser.complaints)


def test_a_prompt_that_is_too_long_is_said_in_words(served, browser):
    start(browser, served)
    ask(browser, "word " * 1000)
    browser.wait_for("document.querySelectorAll('.failed').length == 2")
    said = browser.js("document.querySelector('.failed').textContent")
    assert "exceeds the available context size" in said
    assert all("400" in complaint for complaint in browser.complaints)


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_the_answers_stand_below_each_other_and_nothing_is_cut(dark, served, browser, tmp_path):
    start(browser, served, size=PHONE, dark=dark)
    ask(browser, "Hello " + "x" * 200)
    browser.wait_for(f"{DONE} && {TEXTS}.length == 2")
    boxes = browser.js(
        "[...document.querySelectorAll('.answers .card')].map(card => card.getBoundingClientRect().toJSON())"
    )
    assert boxes[1]["top"] >= boxes[0]["bottom"] and boxes[0]["left"] == boxes[1]["left"]
    assert browser.js("document.documentElement.scrollWidth") <= PHONE[0]
    browser.picture(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 10_000
    assert browser.complaints == []

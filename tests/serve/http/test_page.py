"""The chat page as a person uses it, in a real browser against the real server."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, Route, expect

from raytune_llama.serve.config import SamplingDefaults, ServedModelConfig
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.errors import BusyError, EngineError
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.model import load_served_model
from raytune_llama.serve.http.keys import ApiKeys, make_key
from tests.serve.http.browser import running_browser
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_routes import Here, Server

HOSTILE = "<img src=x onerror='window.hit=1'><script>window.hit=1</script>&amp;"

expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


class Open:
    """The page of a server, in a tab of its own."""

    def __init__(self, browser: Browser) -> None:
        self.tab: Page = browser.new_context(viewport={"width": 1100, "height": 700}).new_page()
        self.tab.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.urls: list[str] = []
        self.tab.on("console", self._on_console)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("request", lambda request: self.urls.append(request.url))

    def _on_console(self, message: object) -> None:
        if getattr(message, "type", "") == "error":
            self.errors.append(getattr(message, "text", ""))

    def go(self, server: Server) -> "Open":
        self.tab.goto(f"http://127.0.0.1:{server.port}/")
        return self

    def choose(self, model: str) -> "Open":
        self.tab.get_by_label("Model").select_option(model)
        return self

    def send(self, text: str) -> None:
        self.tab.get_by_label("Message", exact=True).fill(text)
        self.tab.get_by_label("Message", exact=True).press("Enter")

    def ask(self, text: str) -> None:
        """Ask, and await the end of the answer."""
        self.send(text)
        expect(self.button("Regenerate")).to_be_visible()

    def button(self, name: str):  # noqa: ANN201 - playwright's Locator
        return self.tab.get_by_role("button", name=name, exact=True)

    @property
    def answers(self):  # noqa: ANN201 - playwright's Locator
        return self.tab.locator(".assistant .text")

    @property
    def problem(self):  # noqa: ANN201 - playwright's Locator
        return self.tab.get_by_role("alert")


@pytest.fixture
def page(browser: Browser) -> Iterator[Open]:
    opened = Open(browser)
    yield opened
    opened.tab.context.close()


@pytest.fixture(scope="module")
def models() -> dict[str, Scripted]:
    return {
        "plain": Scripted("one ", "two"),
        "held": Scripted("one ", "two ", "three", held=True, first_seconds=0.5),
        "hostile": Scripted(HOSTILE),
        HOSTILE: Scripted("x"),
        "busy": Scripted(error=BusyError("9 requests are waiting already")),
        "broken": Scripted("half an ", "answer", error=EngineError(HOSTILE)),
    }


@pytest.fixture(scope="module")
def server(models: dict[str, Scripted], answerer: CompletionService) -> Iterator[Server]:
    server = Server({"tiny": Here(answerer), "tiny:poems": Here(answerer), **models})
    yield server
    server.close()


def test_page_lists_models_and_asks_nobody_else(page: Open, server: Server) -> None:
    page.go(server)
    names = page.tab.get_by_label("Model").locator("option")
    expect(names).to_have_count(8)
    assert names.all_text_contents()[:3] == ["tiny", "tiny:poems", "plain"]
    page.ask("the fox")
    assert page.errors == []
    assert {url.split("/")[2] for url in page.urls if not url.startswith("data:")} == {
        f"127.0.0.1:{server.port}"
    }


def test_answer_is_shown_piece_by_piece_then_its_counts(
    page: Open, server: Server, models: dict[str, Scripted]
) -> None:
    page.go(server).choose("held").send("go")
    for shown in ("one ", "one two ", "one two three"):
        expect(page.answers).to_have_text(shown, use_inner_text=False)
        if shown != "one two three":
            expect(page.button("Stop")).to_be_visible()
            models["held"].let()
    expect(page.button("Send")).to_be_visible()
    note = page.tab.locator(".assistant .foot span").inner_text()
    assert "3 prompt, 3 completion" in note
    assert "tokens/s" in note
    # From the question on, not from the status, which a server sends with the first token.
    first = re.search(r"first token after (\S+) s", note)
    assert first is not None
    assert float(first[1]) >= 0.5


def test_stop_ends_the_request_and_frees_its_slot(
    page: Open, served_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(served_dir, tmp_path / "long")
    file = tmp_path / "long" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 200_000}))
    config = ServedModelConfig(path=str(file.parent), template="belle")
    served = load_served_model(config, torch.device("cpu"))
    stepper = BatchScheduler(
        served.model, num_slots=2, max_context=served.max_context, num_tokens=len(served.tokenizer)
    )
    engine = TransformersEngine(stepper, max_waiting=2)
    server = Server({"long": Here(CompletionService(served, engine, SamplingDefaults()))})
    try:
        page.go(server)
        # The likeliest tokens soon repeat themselves, without end.
        page.tab.get_by_label("Temperature").fill("0")
        page.send("the fox")
        expect(page.answers).not_to_be_empty()
        assert stepper.num_running == 1
        page.button("Stop").click()
        expect(page.tab.locator(".foot", has_text="Stopped.")).to_be_visible()
        deadline = time.monotonic() + 30
        while stepper.num_running:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert page.answers.inner_text()
        # Escape does the same, and so does a new chat.
        for end in (lambda: page.tab.keyboard.press("Escape"), page.button("New chat").click):
            page.send("the dog")
            expect(page.answers.last).not_to_be_empty()
            assert stepper.num_running == 1
            end()
            expect(page.button("Send")).to_be_visible()
            deadline = time.monotonic() + 30
            while stepper.num_running:
                assert time.monotonic() < deadline
                time.sleep(0.02)
    finally:
        engine.close()  # ends what runs; the server waits for that
        server.close()


def test_key_is_asked_for_and_stays_in_the_tab(page: Open, models: dict[str, Scripted]) -> None:
    (key, line), (other, _) = make_key(), make_key()
    server = Server({"plain": models["plain"]}, ApiKeys((bytes.fromhex(line),)))
    try:
        page.go(server)
        expect(page.problem).to_contain_text("requires an API key")
        field = page.tab.get_by_label("Key")
        expect(field).to_be_focused()
        field.fill(other)
        field.press("Enter")
        expect(page.problem).to_contain_text("rejected this API key")
        field.fill(key)
        field.press("Enter")
        expect(page.tab.get_by_label("Model").locator("option")).to_have_count(1)
        expect(page.problem).to_be_hidden()
        page.ask("hello")
        expect(page.answers).to_have_text("one two")
        page.tab.reload()
        expect(page.tab.get_by_label("Model").locator("option")).to_have_count(1)
        assert page.tab.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert not [url for url in page.urls if key in url]
        assert key not in page.tab.url
        assert page.tab.evaluate("sessionStorage.getItem('key')") == key
    finally:
        server.close()


def test_text_of_anyone_stays_text(page: Open, server: Server) -> None:
    page.go(server).choose("hostile").ask(HOSTILE)
    assert page.tab.locator(".user .text").text_content() == HOSTILE
    assert page.answers.text_content() == HOSTILE
    page.choose(HOSTILE).send("x")
    expect(page.answers).to_have_count(2)
    assert page.tab.locator("#title").text_content() == HOSTILE
    page.choose("broken").send("x")
    expect(page.tab.locator(".foot .bad")).to_have_text(f"Interrupted. {HOSTILE}")
    assert page.answers.last.text_content() == "half an answer"
    assert page.tab.evaluate("window.hit") is None
    assert page.tab.locator("main img, main script").count() == 0


def test_injected_script_is_blocked_by_the_policy(page: Open, server: Server) -> None:
    def inject(route: Route) -> None:
        answer = route.fetch()
        body = answer.text().replace("</main>", f"</main>{HOSTILE}<script>window.hit=1</script>")
        route.fulfill(response=answer, body=body)

    page.tab.route(f"http://127.0.0.1:{server.port}/", inject)
    page.go(server)
    expect(page.tab.get_by_label("Model").locator("option")).to_have_count(8)  # its own one runs
    assert page.tab.locator("body > img").count() == 1
    assert page.tab.evaluate("window.hit") is None
    assert any("Content Security Policy" in error for error in page.errors)
    # Nor does a page's own script make HTML of text.
    with pytest.raises(Exception, match="TrustedHTML"):
        page.tab.evaluate("document.body.innerHTML = '<b>x</b>'")


FIELDS = {
    "Temperature": ("temperature", "0.70", 0.7),
    "Top p": ("top_p", "0.9", 0.9),
    "Top k": ("top_k", "40", 40),
    "Repetition": ("repetition_penalty", "1.1", 1.1),
    "Max tokens": ("max_tokens", "7", 7),
    # More digits than JavaScript's numbers have.
    "Seed": ("seed", "9007199254740993", 9007199254740993),
}


def test_parameters_are_sent_as_typed_and_only_those(
    page: Open, server: Server, models: dict[str, Scripted]
) -> None:
    page.go(server).choose("plain").ask("hello")
    unset = models["plain"].fields
    assert not {name for name, _, _ in FIELDS.values()} & set(unset)
    assert models["plain"].messages == [("user", "hello")]
    page.button("New chat").click()
    for label, (_, typed, _) in FIELDS.items():
        page.tab.get_by_label(label, exact=True).fill(typed)
    page.tab.get_by_label("System message").fill("Be brief.")
    page.ask("hello")
    said = models["plain"].fields
    assert {name: said[name] for name, _, _ in FIELDS.values()} == {
        name: value for name, _, value in FIELDS.values()
    }
    assert models["plain"].messages == [("system", "Be brief."), ("user", "hello")]


def test_refusals_are_readable_and_lose_no_question(page: Open, server: Server) -> None:
    composer = page.tab.get_by_label("Message", exact=True)
    page.go(server).choose("busy").send("my question")
    expect(page.problem).to_contain_text("9 requests are waiting already")
    expect(page.problem).to_contain_text("Try again in 1 s.")
    expect(composer).to_have_value("my question")
    page.choose("plain").tab.get_by_label("Temperature").fill("0,7")
    composer.press("Enter")
    expect(page.problem).to_contain_text("temperature: 0,7 is not a number")
    page.tab.get_by_label("Temperature").fill("9")
    composer.press("Enter")
    expect(page.problem).to_contain_text("temperature: got 9, expected at most 2")
    page.tab.get_by_label("Temperature").fill("")
    composer.press("Enter")
    expect(page.answers).to_have_text("one two")
    expect(page.problem).to_be_hidden()
    expect(composer).to_have_value("")


def test_server_that_is_gone_is_told(page: Open, models: dict[str, Scripted]) -> None:
    server = Server({"plain": models["plain"]})
    page.go(server)
    expect(page.tab.get_by_label("Model").locator("option")).to_have_count(1)
    server.close()
    page.send("hello")
    expect(page.problem).to_contain_text("can't be reached")


def test_conversation_is_edited_regenerated_and_cleared(
    page: Open, server: Server, models: dict[str, Scripted]
) -> None:
    plain = models["plain"]
    page.go(server).choose("plain").ask("first")
    page.ask("second")
    told = [("user", "first"), ("assistant", "one two"), ("user", "second")]
    assert plain.messages == told
    page.button("Regenerate").click()
    expect(page.button("Send")).to_be_visible()
    expect(page.answers).to_have_count(2)
    assert plain.messages == told
    # An answer is replaced in its place; a question is asked again, without what came behind it.
    page.button("Edit").nth(1).click()
    page.tab.get_by_label("Edited message").fill("better")
    page.button("Save").click()
    page.button("Edit").nth(2).click()
    page.tab.get_by_label("Edited message").fill("second, again")
    page.button("Send again").click()
    expect(page.button("Regenerate")).to_be_visible()
    assert plain.messages == [("user", "first"), ("assistant", "better"), ("user", "second, again")]
    page.button("New chat").click()
    expect(page.tab.locator(".turn")).to_have_count(0)
    page.ask("anew")
    assert plain.messages == [("user", "anew")]


def test_shift_enter_breaks_the_line_and_composing_sends_nothing(
    page: Open, server: Server, models: dict[str, Scripted]
) -> None:
    composer = page.tab.get_by_label("Message", exact=True)
    page.go(server).choose("plain")
    composer.fill("one")
    composer.press("Shift+Enter")
    composer.press_sequentially("two")
    # Enter takes an input method's suggestion.
    composer.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(composer).to_have_value("one\ntwo")
    composer.press("Enter")
    expect(page.button("Regenerate")).to_be_visible()
    assert models["plain"].messages == [("user", "one\ntwo")]


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_page_fits_the_screen(page: Open, server: Server, width: int) -> None:
    page.tab.set_viewport_size({"width": width, "height": 640})
    page.go(server)
    if width < 800:
        page.button("Settings").click()
    page.choose(HOSTILE)  # a long name
    if width < 800:
        page.button("Close settings").click()
    page.ask("long" * 100)
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    right = page.tab.evaluate(
        "Math.max(...[...document.querySelectorAll('main *')]"
        ".map(one => one.getBoundingClientRect().right))"
    )
    assert right <= width

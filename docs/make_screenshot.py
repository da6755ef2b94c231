"""Make docs/chat.png: the chat page, with a short conversation of the demo model.

python docs/make_screenshot.py     needs Chromium in PATH, and demo/model as `make demo` writes it
"""

import asyncio
import shutil
import sys
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import torch
import uvicorn
from playwright.sync_api import expect, sync_playwright

from raytune_llama.serve.answers import Answerer, Part, SamplingDefaults
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.stepper import Stepper
from raytune_llama.serve.http.keys import Keys
from raytune_llama.serve.http.protocol import ChatRequest, CompletionRequest
from raytune_llama.serve.http.routes import build_http
from raytune_llama.serve.models import ServedModelConfig, load_served

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "chat.png"
PORT = 18080
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
)
MILLISECONDS = 10 * 60 * 1000


class Here:
    """The model in this process."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer

    async def answer(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | Part, None]:
        """Yield the prompt's number of tokens, then the parts of all answers."""
        async for item in self._answerer.respond(request):
            yield item

    async def check(self) -> None:
        """Do nothing: the program ends where the engine fails."""


def serve_model() -> None:
    """Serve the demo model on loopback, in a thread that ends with the program."""
    config = ServedModelConfig(
        path=str(ROOT / "demo" / "model"), name="SmolLM2-135M-Instruct", max_context=1024
    )
    served = load_served(config, torch.device("cpu"))
    stepper = Stepper(
        served.model, num_slots=1, max_context=served.max_context, num_tokens=len(served.tokenizer)
    )
    engine = TransformersEngine(stepper, max_waiting=1)
    app = build_http({served.name: Here(Answerer(served, engine, SamplingDefaults()))}, Keys())
    server = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="warning"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)


def main() -> int:
    """Serve, ask, and take the picture."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        sys.stderr.write("no Chromium in PATH; install it: apt-get install chromium\n")
        return 2
    serve_model()
    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        page = browser.new_page(viewport={"width": 1180, "height": 720})
        page.goto(f"http://127.0.0.1:{PORT}/")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("120")
        for number, question in enumerate(QUESTIONS, start=1):
            page.get_by_label("Message", exact=True).fill(question)
            page.get_by_label("Message", exact=True).press("Enter")
            expect(page.locator(".assistant")).to_have_count(number)
            expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
        print(page.locator("#log").inner_text())
        page.screenshot(path=TARGET)
        browser.close()
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

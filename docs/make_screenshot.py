"""Make docs/chat.png: the chat page of a running endpoint, with a short conversation.

python docs/make_screenshot.py [http://127.0.0.1:8000/]     needs Chromium in PATH
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

TARGET = Path(__file__).with_name("chat.png")
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
)
MILLISECONDS = 10 * 60 * 1000
"""Longest wait for an answer: on CPUs it may take minutes."""


def main() -> int:
    """Ask, and take the picture."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/"
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        sys.stderr.write("no Chromium in PATH; install it: apt-get install chromium\n")
        return 2
    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        page = browser.new_page(viewport={"width": 1180, "height": 720})
        page.goto(url)
        expect(page.get_by_label("Model").locator("option")).not_to_have_count(0)
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

"""Take the pictures of the documentation from the demo's results: docs/pictures/*.png.

    raytune demo FOLDER/demo                     # once; `make demo` has it in the top folder
    python -m docs.make_pictures FOLDER [NAME ...]

FOLDER is where the demo's jobs run. Those whose results are missing are run, about 20 minutes on
two cores; take a new folder for new ones. Needs Chromium in PATH. The chat page is taken by
make_screenshot.py, which needs a running endpoint.
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

ROOT: Final = Path(__file__).resolve().parents[1]
PICTURES: Final = ROOT / "docs" / "pictures"
PACKED_SWEEP: Final = ROOT / "examples" / "packed-sweep"
MAX_BYTES: Final = 250_000
WAIT_SECONDS: Final = 60
SETTLE_SECONDS: Final = 10
"""Wait for TensorBoard's charts, which are drawn one after the other."""


@dataclass(frozen=True)
class Picture:
    """A picture of a result."""

    job: str
    """Arguments of `raytune` that make the result in the demo's folder."""

    file: str
    """The result in the demo's folder: a picture, a page, or a folder of TensorBoard's events."""

    height: int = 820
    """Height of the part of a page that is shown, in pixels."""


PICTURES_BY_NAME: Final = {
    "loss": Picture("pretrain", "runs/demo/loss.png"),
    "store": Picture("pretrain", "stores/demo/report.html"),
    "tensorboard": Picture("pretrain", "runs/demo/tensorboard"),
    "sweep": Picture(
        f"sweep {PACKED_SWEEP}/sweep.yaml base={PACKED_SWEEP}/sft.yaml",
        "sweep/sweep.html",
        height=1000,
    ),
    "evaluation": Picture("evaluate", "runs/evaluation/report.html"),
}


def run_job(folder: Path, job: str) -> None:
    """Run `raytune` with the arguments of a job in a folder.

    Raises:
        CalledProcessError: it has failed.
    """
    print(f"raytune {job}")
    program = shutil.which("raytune") or "raytune"
    subprocess.run([program, *job.split()], cwd=folder, check=True)  # noqa: S603


@contextlib.contextmanager
def tensorboard(events: Path) -> Iterator[str]:
    """Serve a run's TensorBoard during the block; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(events.parent.parent)]
    command += ["--port", str(port), "--load_fast", "false"]
    process = subprocess.Popen(command)  # noqa: S603
    try:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(WAIT_SECONDS):
            with contextlib.suppress(OSError), urllib.request.urlopen(url):
                break
            time.sleep(1)
        yield f"{url}#timeseries"
    finally:
        process.terminate()
        process.wait()


def take_page(browser: Browser, url: str, height: int, *, is_tensorboard: bool = False) -> bytes:
    """Return a picture of the top of a page."""
    page = browser.new_page(viewport={"width": 1180, "height": height})
    page.goto(url)
    if is_tensorboard:
        page.wait_for_timeout(SETTLE_SECONDS * 1000)
        page.locator("input[placeholder^='Filter tags']").fill("eval/bits|train/(loss|lr|grad)")
        page.get_by_label("Toggle settings side pane").click()
        page.wait_for_timeout(SETTLE_SECONDS * 1000)
    content = page.screenshot()
    page.close()
    return content


def write_small(content: bytes, target: Path) -> None:
    """Write a picture as a PNG with at most 256 colors."""
    with Image.open(BytesIO(content)) as image:
        image.convert("RGB").quantize(256).save(target, optimize=True)
    size = target.stat().st_size
    print(f"{target}: {size:,} bytes{' (too large)' if size > MAX_BYTES else ''}")


def take(browser: Browser, folder: Path, name: str) -> None:
    """Take one picture."""
    picture = PICTURES_BY_NAME[name]
    result = folder / picture.file
    if not result.exists():
        run_job(folder, picture.job)
    if result.suffix == ".png":
        content = result.read_bytes()
    elif result.is_dir():
        with tensorboard(result) as url:
            content = take_page(browser, url, picture.height, is_tensorboard=True)
    else:
        content = take_page(browser, result.resolve().as_uri(), picture.height)
    write_small(content, PICTURES / f"{name}.png")


def main() -> int:
    """Take all pictures, or those that are named."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    names = sys.argv[2:] or list(PICTURES_BY_NAME)
    if len(sys.argv) < 2 or not set(names) <= PICTURES_BY_NAME.keys():
        sys.stderr.write(f"{__doc__}\nNames: {', '.join(PICTURES_BY_NAME)}\n")
        return 2
    if browser_path is None:
        sys.stderr.write("no Chromium in PATH; install it: apt-get install chromium\n")
        return 2
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        for name in names:
            take(browser, Path(sys.argv[1]), name)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

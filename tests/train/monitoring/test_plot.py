"""Promise: the picture of a run shows its training loss, and validation where there is any."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, LEARNING_RATE, LOSS, MetricsLog
from raytune_llama.train.monitoring.plot import write_plot


def write_run(run_dir: Place, num_steps: int, eval_steps: list[int]) -> Place:
    with MetricsLog(run_dir, resumed_step=0, tensorboard=False) as log:
        for step in range(1, num_steps + 1):
            log.write(step, {LOSS: 3 + np.cos(step), LEARNING_RATE: 1e-3 * step})
            if step in eval_steps:
                log.write(step, {EVAL_LOSS: 3.0 if step % 2 else float("nan")})
    return run_dir


def num_pixels(image: np.ndarray, color: str) -> int:
    """Count the pixels of exactly a line's colour; smoothed edges are of others."""
    wanted = np.round(np.array(to_rgb(color)) * 255)
    return int((np.round(image[..., :3] * 255) == wanted).all(axis=-1).sum())


@pytest.mark.parametrize(
    ("num_steps", "eval_steps", "has_validation"),
    [(40, [1, 15, 39], True), (40, [], False), (40, [2, 4], False), (1, [], False), (1, [1], True)],
)
def test_write_plot_shows_the_series_that_a_run_has(
    tmp_path: Path, num_steps: int, eval_steps: list[int], *, has_validation: bool
) -> None:
    file = write_plot(write_run(Place.local(tmp_path / "run"), num_steps, eval_steps))
    assert file.path == tmp_path / "run" / "loss.png"
    image = matplotlib.image.imread(file.path)
    assert image.shape[:2] == (600, 960)
    # The legend alone draws a line of about 30 pixels.
    assert num_pixels(image, "C0") > (200 if num_steps > 1 else 10)
    assert num_pixels(image, "C2") > (200 if num_steps > 1 else -1)
    assert (num_pixels(image, "C3") > 50) == has_validation
    assert has_validation or num_pixels(image, "C3") == 0


def test_write_plot_again_replaces_the_picture(tmp_path: Path) -> None:
    run_dir = write_run(Place.local(tmp_path / "run"), 5, [])
    before = write_plot(run_dir).read_bytes()
    with MetricsLog(run_dir, resumed_step=5, tensorboard=False) as log:
        log.write(6, {LOSS: 9.0})
    assert write_plot(run_dir).read_bytes() != before
    assert [file.name for file in run_dir.files()] == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize("name", ["$x^$", "a_b$c$", "空"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_write_plot_any_folder_name_is_drawn(tmp_path: Path, name: str) -> None:
    assert write_plot(write_run(Place.local(tmp_path / name), 3, [])).path.is_file()

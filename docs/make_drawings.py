"""Draw docs/pictures/{stages,processes,request}.svg.

python -m docs.make_drawings     # from the top of the repository
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final, Literal

FOLDER: Final = Path(__file__).with_name("pictures")

Kind = Literal["process", "data", "outside", "group"]
Side = Literal["left", "right", "top", "bottom"]

FILLS: Final[Mapping[Kind, tuple[str, str]]] = {
    "process": ("#e3eefb", "#2b6cb0"),
    "data": ("#fdf3d8", "#b7791f"),
    "outside": ("#f1f3f5", "#868e96"),
    "group": ("none", "#adb5bd"),
}
"""Fill and border of a box by its kind."""

_LINE: Final = 17
"""Height of a line of text in a box, in pixels."""


@dataclass(frozen=True)
class Box:
    """A box with lines of text, the first in bold; a group has its text at the top."""

    x: int
    y: int
    width: int
    height: int
    kind: Kind
    lines: Sequence[str]

    def at(self, side: Side, share: float) -> tuple[float, float]:
        """Return a point of a side; the share counts from the left or the top."""
        if side in {"left", "right"}:
            return self.x + self.width * (side == "right"), self.y + self.height * share
        return self.x + self.width * share, self.y + self.height * (side == "bottom")


@dataclass(frozen=True)
class Arrow:
    """A straight arrow between two boxes, with a label beside its middle."""

    start: str
    start_side: Side
    end: str
    end_side: Side
    label: str = ""
    """Lines are separated by line breaks."""
    start_share: float = 0.5
    end_share: float = 0.5
    place: tuple[int, int] = (0, -8)
    """Where the middle of the label's last line is, from the middle of the arrow."""
    is_watch: bool = False
    """Whether it says who watches or stops whom; drawn dashed."""


@dataclass(frozen=True)
class Drawing:
    """A picture."""

    title: str
    width: int
    height: int
    boxes: Mapping[str, Box]
    arrows: Sequence[Arrow]


STAGES = Drawing(
    "Stages of raytune_llama and the directories between them",
    1230,
    372,
    {
        "published": Box(20, 20, 160, 62, "outside", ("published weights", "Meta's, or a hub's")),
        "base": Box(540, 20, 160, 62, "data", ("model directory", "the base")),
        "files": Box(20, 152, 160, 62, "outside", ("your files", "txt, JSON, Parquet")),
        "store": Box(280, 152, 160, 62, "data", ("token store", "ids, loss mask, counts")),
        "run": Box(540, 152, 160, 62, "data", ("run", "checkpoints, metrics")),
        "adapter": Box(800, 152, 160, 62, "data", ("adapter", "LoRA in PEFT's format")),
        "merged": Box(1050, 152, 160, 62, "data", ("model directory", "or .pth, GGUF")),
        "sweep": Box(540, 290, 160, 62, "data", ("sweep", "trials: each is a run")),
        "report": Box(800, 290, 160, 62, "data", ("results", "scores, answers")),
        "endpoint": Box(1050, 290, 160, 62, "process", ("endpoint", "OpenAI's API")),
    },
    (
        Arrow("published", "right", "base", "left", "convert-weights, expand-vocab"),
        Arrow("files", "right", "store", "left", "prepare-data"),
        Arrow("store", "right", "run", "left", "pretrain, sft"),
        Arrow("base", "bottom", "run", "top", "model.path", place=(44, 4)),
        Arrow("run", "right", "adapter", "left", "its result"),
        Arrow("adapter", "right", "merged", "left", "merge"),
        Arrow("base", "right", "merged", "top", "merge", end_share=0.4),
        Arrow("sweep", "top", "run", "bottom", "best.yaml", place=(40, 4)),
        Arrow("merged", "bottom", "endpoint", "top", "serve", place=(26, 4)),
        Arrow("adapter", "bottom", "endpoint", "top", "adapters_dir", 0.6, 0.15, (22, -6)),
        Arrow("merged", "bottom", "report", "top", "", 0.1, 0.8),
        Arrow("adapter", "bottom", "report", "top", "evaluate,\ngenerate", 0.3, 0.3, (-36, 8)),
    ),
)

PROCESSES = Drawing(
    "Processes of a training run, and who watches whom",
    1230,
    470,
    {
        "driver": Box(
            20,
            110,
            230,
            132,
            "process",
            (
                "driver: raytune pretrain",
                "checks config and inputs,",
                "builds the token store,",
                "launches, supervises,",
                "writes the result's plot",
            ),
        ),
        "controller": Box(
            400, 28, 210, 62, "process", ("Ray Train's controller", "starts all workers, or none")
        ),
        "channel": Box(
            400,
            152,
            210,
            78,
            "process",
            ("channel actor", "messages of both directions,", "failure policy"),
        ),
        "ray": Box(400, 292, 210, 44, "outside", ("Ray: nodes of the cluster",)),
        "node1": Box(770, 20, 440, 112, "group", ("node 1",)),
        "node2": Box(770, 152, 440, 112, "group", ("node 2",)),
        "w0": Box(790, 52, 190, 62, "process", ("worker 0", "loop, engine, GPU")),
        "w1": Box(1000, 52, 190, 62, "process", ("worker 1", "loop, engine, GPU")),
        "w2": Box(790, 184, 190, 62, "process", ("worker 2", "loop, engine, GPU")),
        "w3": Box(1000, 184, 190, 62, "process", ("worker 3", "loop, engine, GPU")),
        "dir": Box(
            400,
            388,
            810,
            62,
            "data",
            (
                "run directory",
                "checkpoints, metrics.jsonl, result; .lease/ says which driver may write",
            ),
        ),
    },
    (
        Arrow("driver", "top", "controller", "left", "starts", 0.6, 0.5, (-30, -6)),
        Arrow(
            "controller",
            "right",
            "node1",
            "left",
            "starts, and after a\nfailure starts again",
            0.5,
            0.36,
            (0, -10),
        ),
        Arrow(
            "node1",
            "left",
            "channel",
            "right",
            "heartbeats, each second:\nstep, phase, line of code",
            0.9,
            0.3,
            (0, -12),
            is_watch=True,
        ),
        Arrow("node2", "left", "channel", "right", "", 0.5, 0.6, is_watch=True),
        Arrow(
            "channel", "left", "driver", "right", "each second", 0.3, 0.52, (0, -6), is_watch=True
        ),
        Arrow("driver", "right", "channel", "left", "stop: save now", 0.78, 0.78, (0, 18)),
        Arrow(
            "driver",
            "right",
            "ray",
            "left",
            "draining nodes,\neach 5 s",
            0.96,
            0.5,
            (-30, 34),
            is_watch=True,
        ),
        Arrow(
            "ray",
            "right",
            "node2",
            "left",
            "a hung worker is killed",
            0.5,
            0.85,
            (30, 20),
            is_watch=True,
        ),
        Arrow(
            "node2",
            "bottom",
            "dir",
            "top",
            "checkpoints, if the lock\nis still this driver's",
            0.5,
            0.73,
            (88, 4),
        ),
        Arrow(
            "driver",
            "bottom",
            "dir",
            "left",
            "lock: heartbeat\neach 5 s",
            0.5,
            0.5,
            (-70, 10),
            is_watch=True,
        ),
    ),
)

REQUEST = Drawing(
    "A request's way through the endpoint",
    1230,
    452,
    {
        "client": Box(20, 128, 150, 62, "outside", ("client", "openai, LangChain, ...")),
        "tls": Box(20, 290, 150, 62, "outside", ("reverse proxy", "TLS, if public")),
        "proxy": Box(250, 128, 150, 62, "process", ("HAProxy", "forwards connections")),
        "gateway": Box(
            250, 290, 150, 78, "process", ("gateway", "with several models:", "reads the name")
        ),
        "replica": Box(
            490, 20, 720, 250, "group", ("replica: the HTTP server that holds the model",)
        ),
        "guard": Box(510, 56, 150, 78, "process", ("request guard", "key, sizes,", "times")),
        "limit": Box(
            690, 56, 150, 78, "process", ("rate limit", "per key, by one", "actor for all")
        ),
        "route": Box(
            870, 56, 150, 78, "process", ("route", "fields: used, refused", "by name, counted")
        ),
        "render": Box(
            1050, 56, 140, 78, "process", ("chat template", "text to ids, as", "in training")
        ),
        "engine": Box(1050, 176, 140, 78, "process", ("engine", "one batch of all", "requests")),
        "text": Box(
            870, 176, 150, 78, "process", ("detokenizer", "stops, tool calls,", "log-probabilities")
        ),
        "events": Box(
            690, 176, 150, 78, "process", ("response", "JSON, or events", "as they come")
        ),
        "adapters": Box(1050, 330, 140, 62, "data", ("adapters_dir", "loaded on demand")),
        "serve": Box(490, 330, 170, 62, "process", ("Serve's controller", "scales, replaces")),
    },
    (
        Arrow("client", "right", "proxy", "left", "HTTP"),
        Arrow("client", "bottom", "tls", "top"),
        Arrow("tls", "right", "proxy", "left", "", 0.3, 0.8),
        Arrow("proxy", "right", "guard", "left", "", 0.3, 0.5),
        Arrow("guard", "right", "limit", "left"),
        Arrow("limit", "right", "route", "left"),
        Arrow("route", "right", "render", "left"),
        Arrow("render", "bottom", "engine", "top"),
        Arrow("engine", "left", "text", "right"),
        Arrow("text", "left", "events", "right"),
        Arrow("events", "left", "proxy", "right", "the answer", 0.5, 0.75, (0, -10)),
        Arrow("proxy", "bottom", "gateway", "top", "", 0.3, 0.3),
        Arrow("gateway", "top", "proxy", "bottom", "/NAME", 0.7, 0.7, (30, 4)),
        Arrow("adapters", "top", "engine", "bottom"),
        Arrow(
            "serve",
            "top",
            "replica",
            "bottom",
            "health, load",
            end_share=0.118,
            place=(46, 6),
            is_watch=True,
        ),
    ),
)

DRAWINGS: Final[Mapping[str, Drawing]] = {
    "stages": STAGES,
    "processes": PROCESSES,
    "request": REQUEST,
}


def render(drawing: Drawing) -> str:
    """Return a drawing as SVG."""
    size = f'width="{drawing.width}" height="{drawing.height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.width} {drawing.height}" '
        f'role="img" font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f"<title>{escape(drawing.title)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#495057"/></marker></defs>',
        f'<rect {size} rx="10" fill="#ffffff"/>',
    ]
    groups = [box for box in drawing.boxes.values() if box.kind == "group"]
    others = [box for box in drawing.boxes.values() if box.kind != "group"]
    for box in groups:
        lines += _box_lines(box)
    for arrow in drawing.arrows:
        lines.append(_arrow_line(arrow, drawing.boxes))
    for box in others:
        lines += _box_lines(box)
    for arrow in drawing.arrows:
        lines += _label_lines(arrow, drawing.boxes)
    return "\n".join([*lines, "</svg>", ""])


def _box_lines(box: Box) -> Iterator[str]:
    fill, border = FILLS[box.kind]
    dashes = ' stroke-dasharray="5 4"' if box.kind == "group" else ""
    yield (
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="7" '
        f'fill="{fill}" stroke="{border}"{dashes}/>'
    )
    middle = box.x + box.width / 2
    first = box.y + box.height / 2 - _LINE * (len(box.lines) - 1) / 2 + 4
    if box.kind == "group":
        first = box.y + _LINE + 3
    for number, line in enumerate(box.lines):
        weight = ' font-weight="bold"' if number == 0 else ""
        yield (
            f'<text x="{middle:g}" y="{first + number * _LINE:g}" text-anchor="middle" '
            f'fill="#212529"{weight}>{escape(line)}</text>'
        )


def _ends(arrow: Arrow, boxes: Mapping[str, Box]) -> tuple[float, float, float, float]:
    start = boxes[arrow.start].at(arrow.start_side, arrow.start_share)
    return (*start, *boxes[arrow.end].at(arrow.end_side, arrow.end_share))


def _arrow_line(arrow: Arrow, boxes: Mapping[str, Box]) -> str:
    x1, y1, x2, y2 = (f"{value:g}" for value in _ends(arrow, boxes))
    dashes = ' stroke-dasharray="5 4"' if arrow.is_watch else ""
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#495057" stroke-width="1.4" '
        f'marker-end="url(#head)"{dashes}/>'
    )


def _label_lines(arrow: Arrow, boxes: Mapping[str, Box]) -> Iterator[str]:
    x1, y1, x2, y2 = _ends(arrow, boxes)
    x, y = (x1 + x2) / 2 + arrow.place[0], (y1 + y2) / 2 + arrow.place[1]
    lines = arrow.label.split("\n") if arrow.label else []
    for number, line in enumerate(lines):
        height = y - (len(lines) - 1 - number) * _LINE
        yield (
            f'<text x="{x:g}" y="{height:g}" text-anchor="middle" fill="#495057" font-size="12" '
            f'stroke="#ffffff" stroke-width="4" paint-order="stroke">{escape(line)}</text>'
        )


def main() -> int:
    """Write every drawing."""
    FOLDER.mkdir(exist_ok=True)
    for name, drawing in DRAWINGS.items():
        path = FOLDER / f"{name}.svg"
        path.write_text(render(drawing), encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

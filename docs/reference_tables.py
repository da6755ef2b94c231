"""Pages of the reference that are read from constants, classes and routes; see make_reference."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final, get_args, get_origin

from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import raytune_llama
from raytune_llama import cli, signals
from raytune_llama.config import fields
from raytune_llama.serve.config import RequestLimits
from raytune_llama.serve.http.keys import ApiKeys
from raytune_llama.serve.http.metrics import ServeMetrics
from raytune_llama.serve.http.request_guard import PUBLIC_PATHS
from raytune_llama.serve.http.routes import build_http_app
from raytune_llama.serve.protocol.fields import RequestModel
from raytune_llama.train.monitoring import metrics
from raytune_llama.train.orchestration.exported_metrics import ExportedMetrics

_FIRST_STATUSES: Final = (
    (0, "Done: the job has finished, or a run had finished before."),
    (1, "Failed, with a traceback or the causes: a bug, a non-finite loss, too many failures."),
)
_EXPORTED_HEAD: Final = ("metric", "type", "tags", "meaning")
_PLACEHOLDERS: Final = re.compile(r"%%|(?:%[-+ #0]*\d*(?:\.\d+)?[a-z])+")
_SOURCES: Final = "../../raytune_llama"
_STOPS: Final = {"_resumable", "EXIT_STOPPED"}
"""Names by which a function of the command line says that its job can be resumed."""


def cell(text: str) -> str:
    """Return a docstring as the text of a table's cell; paragraphs become line breaks."""
    return "<br>".join(join_paragraphs(text).split("\n\n")).replace("|", "\\|")


def join_paragraphs(text: str) -> str:
    """Return a text with one line per paragraph."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def code(text: str) -> str:
    """Return a value as code in Markdown."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def summary(documented: Any) -> str:  # noqa: ANN401  # whatever has a docstring
    """Return the first line of a docstring."""
    return inspect.cleandoc(documented.__doc__ or "").partition("\n")[0]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def docs_below(body: Sequence[ast.stmt]) -> dict[str, str]:
    """Return the docstring under each name that statements assign, empty if there is none."""
    found: dict[str, str] = {}
    for number, statement in enumerate(body):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = ""
            case _:
                continue
        match body[number + 1 : number + 2]:
            case [ast.Expr(value=ast.Constant(value=str(text)))]:
                found[name] = text
    return found


def constants_of(module: ModuleType, kind: type[Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield name, value and docstring of a module's public constants of one type."""
    for name, text in docs_below(ast.parse(inspect.getsource(module)).body).items():
        value = getattr(module, name, None)
        if name.isupper() and not name.startswith("_") and type(value) is kind:
            yield name, value, text


def render_metrics() -> str:
    """Return the page of metrics: those of training, and those of an endpoint."""
    training = [
        (code(value), cell(text)) for _, value, text in constants_of(metrics, str) if "/" in value
    ]
    assert all(text for _, text in training), training
    exported, served = _Descriptions(), _Descriptions()
    ExportedMetrics(exported, "")
    ServeMetrics(served)
    return (
        "\n\n".join(
            [
                "# Metrics",
                "## Training",
                "A run appends them to `metrics.jsonl` in its directory, one record per step or "
                "evaluation, with its `step`; TensorBoard has the same. A value that is not "
                "finite is null.",
                table(("metric", "meaning"), training),
                "## Training, exported to Prometheus",
                "Each node of the cluster exports them while a driver runs; the tag is the run's "
                "directory.",
                table(_EXPORTED_HEAD, exported.rows),
                "## An endpoint",
                "Each node of the cluster exports them to Prometheus. Ray adds tags of replica, "
                "deployment and application; sums over replicas are Prometheus's to compute. A "
                "histogram has `_bucket`, `_sum` and `_count`.",
                table(_EXPORTED_HEAD, served.rows),
            ]
        )
        + "\n"
    )


@dataclass(frozen=True)
class _Metric:
    """A metric of an endpoint that is only described."""

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        """Do nothing."""

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Do nothing."""

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Do nothing."""


class _Descriptions:
    """A metrics API that notes what is created; see `MetricsApi`."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []

    def _note(self, kind: str, name: str, description: str, tags: Sequence[str] | None) -> _Metric:
        exported = f"ray_{name}{'_total' if kind == 'counter' else ''}"
        named = ", ".join(map(code, tags or ()))
        self.rows.append((code(exported), kind, named, cell(description)))
        return _Metric()

    def Counter(  # noqa: N802  # Ray's name
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> _Metric:
        """Note a counter."""
        return self._note("counter", name, description, tag_keys)

    def Gauge(  # noqa: N802
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> _Metric:
        """Note a gauge."""
        return self._note("gauge", name, description, tag_keys)

    def Histogram(  # noqa: N802
        self,
        name: str,
        description: str = "",
        boundaries: list[float] | None = None,
        tag_keys: tuple[str, ...] | None = None,
    ) -> _Metric:
        """Note a histogram."""
        bounds = ", ".join(f"{bound:g}" for bound in boundaries or ())
        return self._note("histogram", name, f"{description}; buckets: {bounds}", tag_keys)


def render_exit_statuses() -> str:
    """Return the page of exit statuses, and which verbs exit with 75."""
    named = [
        (value, text)
        for module in (cli, signals)
        for name, value, text in constants_of(module, int)
        if name.startswith("EXIT_")
    ]
    rows = [(str(value), cell(text)) for value, text in sorted({*_FIRST_STATUSES, *named})]
    resumable = ", ".join(f"`{verb}`" for verb in cli.VERBS if is_resumable(verb))
    return (
        "\n\n".join(
            [
                "# Exit statuses",
                table(("status", "meaning"), rows),
                f"After Ctrl-C, a closed terminal or SIGTERM, these exit with {cli.EXIT_STOPPED}: "
                f"{resumable}. The same command resumes them. Others exit with "
                f"{signals.EXIT_INTERRUPTED} and start again.",
                "`ray job status` shows the status as `driver_exit_code`, and in the message of a "
                "job that ended by itself. For a job stopped by `ray job stop`, Ray 2.60 reports "
                "STOPPED without a status.",
            ]
        )
        + "\n"
    )


def log_messages(source: str) -> Iterator[tuple[str, str]]:
    """Yield level and text of each message that a module logs; `…` stands for a value.

    Messages that are nothing but values are left out.
    """
    tree = ast.parse(source)
    named = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Attribute(ast.Name("logger"), level), [message, *_]):
                text = _text_of(message, named)
            case ast.Call(ast.Name("waiting"), [ast.Name("logger"), what], [usually]):
                took = _text_of(usually.value, named)
                level, text = "info", f"{_text_of(what, named)}; usually takes {took}"
            case _:
                continue
        if any(map(str.isalpha, text.partition("; usually takes ")[0])):
            yield level, text


def _text_of(node: ast.expr, named: Mapping[str, ast.expr]) -> str:
    """Return the text that an expression stands for, with `…` for values.

    Args:
        node: a literal, an f-string, or the name of one.
        named: expressions by the names that they are assigned to.
    """
    match node:
        case ast.Constant(str(text)):
            return _PLACEHOLDERS.sub(lambda found: "%" if found[0] == "%%" else "…", text)
        case ast.JoinedStr(parts):
            return "".join(_text_of(part, named) for part in parts)
        case ast.Name(name) if name in named:
            return _text_of(named[name], {})
        case _:
            return "…"


def render_log_messages() -> str:
    """Return the page of what jobs, workers and endpoints log, by package."""
    parts = [
        "# Log messages",
        "By the subpackage that logs them; `…` stands for values. A line of the log is time, "
        "subpackage and message, such as `17:18:07 train: waiting for nodes (5 of 8 s): ...`; a "
        "warning has `warning:` in front of the message, an error `error:`. Errors that end a job "
        "are not among them: they are printed when it ends, see [exit statuses](exit-status.md) "
        "and [troubleshooting](../troubleshooting.md).",
    ]
    package = Path(inspect.getfile(raytune_llama)).parent
    for folder in (package, *sorted(path.parent for path in package.glob("*/__init__.py"))):
        files = folder.glob("*.py") if folder == package else folder.rglob("*.py")
        rows = [
            (f"[{file.stem}]({_SOURCES}/{file.relative_to(package)})", level, cell(code(text)))
            for file in sorted(files)
            for level, text in log_messages(file.read_text(encoding="utf-8"))
        ]
        if rows:
            name = "top of the package" if folder == package else code(folder.name)
            parts += [f"## {name}", table(("module", "level", "message"), rows)]
    return "\n\n".join(parts) + "\n"


def is_resumable(verb: str) -> bool:
    """Whether a verb's function, or one of its module that it calls, says that it resumes."""
    functions = {
        node.name: {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        for node in ast.parse(inspect.getsource(cli)).body
        if isinstance(node, ast.FunctionDef)
    }
    used = functions[cli.VERBS[verb].__name__]
    return bool(_STOPS & used.union(*(functions.get(name, set()) for name in used)))


def render_http() -> str:
    """Return the page of an endpoint's routes and the fields of their requests."""
    no_keys = ApiKeys(())
    app = build_http_app({}, no_keys, RequestLimits(), metrics=ServeMetrics(_Descriptions()))
    operations = app.openapi()["paths"]
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    rows: list[tuple[str, ...]] = []
    requests: dict[str, type[RequestModel]] = {}
    for route in routes:
        methods = sorted(route.methods or ())
        body = body_of(route.endpoint)
        if body is not None:
            requests[route.path] = body
        described = operations.get(route.path_format, {}).get(methods[0].lower(), {})
        statuses = ", ".join(sorted(described.get("responses", {})))
        key = "no" if route.path in PUBLIC_PATHS else "yes"
        shown = code(f"{', '.join(methods)} {route.path_format}")
        rows.append((shown, cell(summary(route.endpoint)), key, statuses))
    meanings = {
        status: response["description"]
        for methods in operations.values()
        for operation in methods.values()
        for status, response in operation["responses"].items()
        if status != "200"
    }
    parts = [
        "# HTTP routes",
        "Of a model's application; the gateway of an endpoint with several models has the same, "
        "without `DELETE`. `/openapi.json` describes requests and responses in full. The column "
        "*key* says whether a key is needed if the endpoint has keys.",
        table(("route", "what it does", "key", "statuses"), rows),
        table(("status", "meaning"), sorted(meanings.items())),
        "An error's body is OpenAI's: `error.message`, `.type`, `.param` and `.code`. A field "
        "without a description means what it means in OpenAI's API. null is the same as an absent "
        "field.",
    ]
    for path, body in requests.items():
        parts += [f"## `POST {path}`", *_render_request(body)]
        for model in _find_parts(body):
            title = f"### `{model.__name__}` in `{path}`"
            parts += [title, cell(summary(model)), *_render_request(model)]
    return "\n\n".join(parts) + "\n"


def body_of(endpoint: Callable[..., Any]) -> type[RequestModel] | None:
    """Return the request model that a route's function takes, if any."""
    for parameter in inspect.signature(endpoint).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, RequestModel):
            return kind
    return None


def _render_request(model: type[RequestModel]) -> list[str]:
    docs: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(tree, ast.ClassDef)
            docs |= {name: text for name, text in docs_below(tree.body).items() if text}
    rows = [
        (
            code(field.alias or name),
            code(_input_type(field)),
            "required" if field.is_required() else code(_default_text(field)),
            cell(docs.get(name, "")),
        )
        for name, field in model.model_fields.items()
    ]
    parts = [table(("field", "type", "default", "meaning"), rows)] if rows else []
    if model.no_effect:
        parts.append(f"Accepted, without effect: {', '.join(map(code, sorted(model.no_effect)))}.")
    if model.unsupported:
        by_advice: dict[str, list[str]] = {}
        for name, refusal in sorted(model.unsupported.items()):
            by_advice.setdefault(refusal.advice, []).append(code(name))
        parts.append("Refused by name, as they would change the answer:")
        parts.append("\n".join(f"- {', '.join(names)}: {do}" for do, names in by_advice.items()))
    return parts


def _input_type(field: FieldInfo) -> str:
    """Return in words what a field of a request accepts, before a validator converts it."""
    for part in field.metadata:
        accepted = getattr(part, "json_schema_input_type", PydanticUndefined)
        if accepted is not PydanticUndefined and accepted is not Any:
            return fields.type_text(accepted)
    return fields.type_text(field.annotation, field.metadata)


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    return "{}" if isinstance(default, BaseModel) else fields.default_text(field)


def _find_parts(request: type[RequestModel]) -> list[type[RequestModel]]:
    """Return the models inside a request, each once, in the order of their first use."""
    found: dict[type[RequestModel], None] = {}
    waiting = [request]
    while waiting:
        for field in waiting.pop(0).model_fields.values():
            for inner in _models_in(field.annotation):
                if inner not in found:
                    found[inner] = None
                    waiting.append(inner)
    return list(found)


def _models_in(annotation: object) -> Iterator[type[RequestModel]]:
    if isinstance(annotation, type) and issubclass(annotation, RequestModel):
        yield annotation
    arguments = get_args(annotation)
    for argument in arguments[:1] if get_origin(annotation) is Annotated else arguments:
        yield from _models_in(argument)

"""Make docs/reference/ and the JSON schemas of configs from the package.

python -m docs.make_reference            # from the top of the repository; or: make reference
python -m docs.make_reference --check    # writes nothing; prints differences and exits with 1
"""

import difflib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pydantic
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from docs.reference_tables import (
    cell,
    code,
    join_paragraphs,
    render_exit_statuses,
    render_http,
    render_log_messages,
    render_metrics,
    summary,
    table,
)
from raytune_llama.cli import VERBS, config_classes
from raytune_llama.config import fields
from raytune_llama.config.settings import changeable_fields
from raytune_llama.data.config import PrepareChatDataConfig, PrepareDataConfig

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = ROOT / "docs" / "reference"
SCHEMAS: Final = ROOT / "jobs" / "configs" / "schemas"

ALTERNATIVES: Final[Mapping[str, tuple[type[Any], ...]]] = {
    "prepare-data": (PrepareDataConfig, PrepareChatDataConfig)
}
"""Root classes of a verb that takes configs of several; the value of a field decides which."""

_OTHER_PAGES: Final = (
    ("metrics.md", "metrics of training, and those that an endpoint exports to Prometheus"),
    ("exit-status.md", "exit statuses of `raytune`"),
    ("log-messages.md", "messages of the log, by package"),
    ("http.md", "routes of an endpoint, and every field of their requests"),
)


@dataclass(frozen=True)
class Section:
    """The fields of one settings class at one place of a config."""

    path: str
    """Dotted path of the settings; empty for the root."""

    kind: type[Any]
    """The settings class."""

    fields: Mapping[str, FieldInfo]
    """Its fields by dotted path from the root."""


def find_sections(kind: type[Any], prefix: str = "") -> Iterator[Section]:
    """Yield a class's own fields, then those of the settings inside, in the order of the source.

    Args:
        kind: settings class.
        prefix: path of its fields, with a dot at the end; empty for the root.
    """
    found = {f"{prefix}{name}": field for name, field in fields.fields_of(kind).items()}
    yield Section(prefix.removesuffix("."), kind, found)
    for path, field in found.items():
        for below, nested in fields.nested_settings(field.annotation):
            yield from find_sections(nested, f"{path}.{below}")


def roots_of(verb: str) -> tuple[type[Any], ...]:
    """Return the root settings classes of a verb; empty if it takes no config."""
    kind = config_classes().get(verb)
    return ALTERNATIVES.get(verb, () if kind is None else (kind,))


def default_config_of(verb: str) -> str | None:
    """Return the name of the config that a verb reads without one; None if it needs none."""
    found = re.search(r'default_config\("([\w.]+)"\)', inspect.getsource(VERBS[verb]))
    return None if found is None else found[1]


def render_config(verb: str) -> str:
    """Return the page of a verb's config."""
    default = default_config_of(verb)
    file = f"[{default}](../../jobs/configs/{default})"
    parts = [
        f"# `raytune {verb}`",
        summary(VERBS[verb]),
        f"    raytune {verb} [CONFIG.yaml] [a.b=c ...]",
        f"Without a config file it uses {file}." if default else "It has no default config.",
        f"JSON schema for editors: [{verb}.json](../../jobs/configs/schemas/{verb}.json).",
    ]
    seen: set[str] = set()
    for root in roots_of(verb):
        sections = list(find_sections(root))
        changeable = frozenset(changeable_fields(root))
        if changeable:
            parts.append(
                "*May change* marks the fields that a resumed run may change; any other must be "
                "the same as at its start."
            )
        parts += [
            part for section in sections for part in _render_section(section, changeable, seen)
        ]
    return "\n\n".join(parts) + "\n"


def _render_section(section: Section, changeable: frozenset[str], seen: set[str]) -> list[str]:
    """Return the heading, description and table of a section.

    Args:
        section: settings at one place.
        changeable: paths of the fields that may change when a run is resumed.
        seen: anchors of the page so far; those of the section are added.
    """
    rows: list[tuple[str, ...]] = []
    for path, field in section.fields.items():
        anchor = "" if path in seen else f'<a id="{path}"></a>'
        seen.add(path)
        default = "required" if field.is_required() else fields.default_text(field)
        default = default if default in {"required", "as below"} else code(default)
        if path in changeable:
            default += "<br>*may change*"
        rows.append(
            (
                f"{anchor}{code(path)}",
                code(fields.type_text(field.annotation, field.metadata)),
                default,
                cell(field.description or ""),
            )
        )
    title = section.path or section.kind.__name__
    described = join_paragraphs(inspect.cleandoc(section.kind.__doc__ or ""))
    return [f"## `{title}`", described, table(("field", "type", "default", "meaning"), rows)]


def render_index() -> str:
    """Return the page that lists the others, with the verbs."""
    rows = [
        (f"[`{verb}`]({verb}.md)" if roots_of(verb) else code(verb), cell(summary(act)))
        for verb, act in VERBS.items()
    ]
    return (
        "\n\n".join(
            [
                "# Reference",
                "Made from the code by `make reference`; `make check` fails if it is not current.",
                table(("`raytune` ...", "what it does"), rows),
                "A verb with a link has a config: a YAML file, and `a.b=c` overrides whose right "
                "side is YAML. The page lists every field; `raytune VERB --help` prints the same.",
                "\n".join(f"- [{text}]({page})" for page, text in _OTHER_PAGES),
                "An editor with a YAML language server completes and checks a config that names "
                "its schema in the first line, as those in [jobs/configs](../../jobs/configs) do. "
                "The path is absolute or relative to the config; in a clone the schemas are in "
                "`jobs/configs/schemas`, in an installed package `raytune_llama/configs/schemas`:",
                "    # yaml-language-server: $schema=/path/to/jobs/configs/schemas/pretrain.json",
                "A schema checks names and types; relations between fields are checked when the "
                "job starts, all at once and before Ray.",
            ]
        )
        + "\n"
    )


class _PlainSchema(GenerateJsonSchema):
    """JSON schemas without titles, which would repeat the names of the fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ANN401, ARG002  # pydantic's
        """Return False: no field has a title."""
        return False


def build_schema(verb: str) -> dict[str, Any]:
    """Return the JSON schema of a verb's config, with the docstrings as descriptions."""
    roots = roots_of(verb)
    union: Any = roots[0] if len(roots) == 1 else roots[0] | roots[1]
    schema = pydantic.TypeAdapter(union).json_schema(schema_generator=_PlainSchema)
    inside = schema.get("$defs", {})
    for section in (section for root in roots for section in find_sections(root)):
        name = section.kind.__name__
        described = inside.get(name, schema)
        assert described.get("title") == name, f"{verb}: {name} is ambiguous or missing"
        for path, field in section.fields.items():
            # pydantic leaves out the docstrings of inherited fields.
            place = described["properties"][path.rpartition(".")[2]]
            place["description"] = " ".join((field.description or "").split())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def build_files() -> dict[Path, str]:
    """Return the text of every file of the reference, by path."""
    verbs = [verb for verb in VERBS if roots_of(verb)]
    files = {PAGES / f"{verb}.md": render_config(verb) for verb in verbs}
    files[PAGES / "README.md"] = render_index()
    files[PAGES / "metrics.md"] = render_metrics()
    files[PAGES / "exit-status.md"] = render_exit_statuses()
    files[PAGES / "http.md"] = render_http()
    files[PAGES / "log-messages.md"] = render_log_messages()
    for verb in verbs:
        text = json.dumps(build_schema(verb), indent=1, ensure_ascii=False)
        files[SCHEMAS / f"{verb}.json"] = f"{text}\n"
    return files


def find_stale(files: Mapping[Path, str]) -> list[Path]:
    """Return the files of the reference that are no longer made."""
    return sorted({*PAGES.glob("*.md"), *SCHEMAS.glob("*.json")} - files.keys())


def find_differences(files: Mapping[Path, str]) -> Iterator[str]:
    """Yield the lines of a unified diff from the files that exist to those that would be made."""
    for path in sorted({*files, *find_stale(files)}):
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        name = path.relative_to(ROOT).as_posix()
        yield from difflib.unified_diff(
            old.splitlines(), files.get(path, "").splitlines(), name, "the code", lineterm="", n=1
        )


def main() -> int:
    """Write the reference, or with --check say whether it is current."""
    files = build_files()
    if sys.argv[1:] == ["--check"]:
        differences = list(find_differences(files))
        print("\n".join(differences) if differences else f"{len(files)} files are current")
        if differences:
            print("the reference is not current; run: make reference")
        return 1 if differences else 0
    if sys.argv[1:]:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    for path in find_stale(files):
        path.unlink()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(files)} files in {PAGES.relative_to(ROOT)} and {SCHEMAS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

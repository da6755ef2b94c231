"""The commands and configs of the documents are accepted: verbs, fields, values, files."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from raytune_llama.cli import VERBS, config_classes
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, describe, from_dict, load
from raytune_llama.config.yaml12 import parse_mapping
from raytune_llama.serve.config import expand_model_dir

ROOT = Path(__file__).parents[2]
# The page about upgrading quotes commands of older versions; the reference has forms of commands.
PAGES: Final = [
    path
    for place in ("*.md", "[a-z]*/README.md", "examples/*/README.md", "docs/**/*.md")
    for path in sorted(ROOT.glob(place))
    if path.name != "upgrading.md" and path.parent.name != "reference"
]
CLASSES: Final = config_classes()
DEFAULTS: Final = {
    "prepare-data": "prepare_data_smollm2",
    "pretrain": "pretrain_smollm2",
    "sft": "sft_smollm2",
    "sweep": "sweep_smollm2",
    "evaluate": "evaluate_smollm2",
    "generate": "generate_smollm2",
    "expand-vocab": "expand_vocab_smollm2",
    "make-data": "make_data",
}
"""Config that a verb reads if no file is named."""

REQUIRED: Final = "required, but not given"
FOREIGN: Final = {"apiVersion", "applications", "scrape_configs", "services", "cluster_name", "on"}
"""Keys of YAML files that other programs read."""

COMMAND: Final = re.compile(
    r"(?:^\s*|[;&|(] *|-- |\$ |until |run-job |=\S+ )"  # what may come before a command
    r"(?:raytune |python jobs/)([a-z][a-z_-]+)(?:\.py)?(?= |\)|$)(.*)"
)


class Command(NamedTuple):
    """A command of a page: a verb of `raytune` and its arguments."""

    page: str
    verb: str
    arguments: list[str]


def code_of(text: str) -> str:
    """Return the indented and fenced code of a page, without fences that name another language."""
    fences = re.findall(r"^```(?:sh|bash|console|)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^(?: {4}|\t)(.*)$", rest, re.MULTILINE)
    return re.sub(r"\\\n *", "", "\n".join([*fences, *indented]))


def split(arguments: str) -> list[str]:
    """Return the words of a command up to its end in a shell, without a comment."""
    lexer = shlex.shlex(arguments, posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set(";&|<>()"):
            break
        words.append(word)
    return [word for word in words if word != "..."]


def find_commands() -> Iterator[Command]:
    for page in PAGES:
        for line in code_of(page.read_text(encoding="utf-8")).splitlines():
            found = COMMAND.search(line.partition(" #")[0])
            # Output of a job quotes no commands at the beginning of a line but those to repeat.
            if found and not re.match(r"\s*\d\d:\d\d:\d\d ", line):
                verb = found[1].replace("_", "-").replace("prepare-demo", "demo")
                yield Command(page.relative_to(ROOT).as_posix(), verb, split(found[2]))


def problems_of(verb: str, arguments: list[str]) -> list[str]:
    """Return what is wrong with a command; a config file that a reader writes is not looked at."""
    cls = CLASSES[verb]
    if "--help" in arguments:
        for section in arguments[1:]:
            describe(cls, section)
        return []
    if verb == "serve":
        if arguments[:1] == ["serve/config.yaml"]:  # a file of Ray Serve, tested with the endpoint
            return []
        arguments = expand_model_dir(arguments)
    files = [word for word in arguments[:1] if word.endswith((".yaml", ".yml"))]
    default = None if files or verb not in DEFAULTS else DEFAULTS[verb]
    if files and (ROOT / files[0]).is_file():
        arguments = [str(ROOT / files[0]), *arguments[1:]]
    elif files:
        arguments = arguments[1:]
    path = ROOT / "jobs" / "configs" / f"{default}.yaml" if default else None
    try:
        load(cls, arguments, default=path, program=f"raytune {verb}")
    except ConfigError as error:
        return [problem for problem in error.problems if not (files and REQUIRED in problem)]
    return []


# One command on the pages shows what mistakes look like; `test_readme` compares its output.
COMMANDS = [command for command in find_commands() if "lora.rnk=16" not in command.arguments]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 60
    verbs = {command.verb for command in COMMANDS}
    assert verbs >= {"demo", "pretrain", "sft", "sweep", "merge", "serve"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.verb}")
def test_command_of_a_page_is_accepted(command: Command) -> None:
    assert command.verb in VERBS
    # A store is also built from the config of a training job.
    verbs = [command.verb, *["pretrain", "sft"] * (command.verb == "prepare-data")]
    verbs = [verb for verb in verbs if verb in CLASSES]
    problems = [problems_of(verb, command.arguments) for verb in verbs]
    assert not problems or min(problems, key=len) == []


def find_configs() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            yield page.relative_to(ROOT).as_posix(), block


@pytest.mark.parametrize(("page", "block"), list(find_configs()))
def test_config_of_a_page_is_one_of_a_verb(page: str, block: str) -> None:
    data, mistakes = parse_mapping(block, page)
    assert data is not None
    assert not mistakes
    if FOREIGN & set(data):
        return
    found: dict[str, list[str]] = {}
    for verb, cls in CLASSES.items():
        try:
            from_dict(cls, data)
        except UserError as error:
            lines = error.problems if isinstance(error, ConfigError) else [str(error)]
            # A part of a config, such as `scale`, lacks the rest; a sweep's base is the reader's.
            found[verb] = [
                line for line in lines if REQUIRED not in line and not line.startswith("base: ")
            ]
        else:
            return
    assert [] in found.values(), min(found.values(), key=len)


@pytest.mark.parametrize(
    ("verb", "arguments", "problem"),
    [
        ("pretrain", ["my.yaml", "lora.rnk=8"], "lora.rnk: no such field; did you mean lora.rank?"),
        ("sft", ["data.sources=[{path: a}]"], "data.sources: got an override without a config"),
        ("merge", ["base=a", "adapters=[b]"], "target: required, but not given"),
    ],
)
def test_wrong_command_is_found(verb: str, arguments: list[str], problem: str) -> None:
    assert [line for line in problems_of(verb, arguments) if line.startswith(problem)]

"""Prompts that ask for instruction data: topics and task types drawn by the number of a request.

    texts = load_texts(config.prompt)
    prompt = build_prompt(config.prompt, texts, number=7)

The same seed and number give the same prompt, so that a request can be repeated after a restart.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from raytune_llama.config.settings import ConfigError
from raytune_llama.generate.make_data.config import PromptConfig
from raytune_llama.storage.hashes import hash_bytes

LISTS = Path(__file__).parent / "lists"
"""Folder with the package's own topics, task types and prompts, by language."""

_SENTENCE_ENDS = re.compile(r"[。；：！？\n]|[.;:!?](?=\s|$)")  # noqa: RUF001  # Chinese
_MIN_SENTENCE_CHARS = {"zh": 12, "en": 30}
_SEPARATORS = {"zh": "、", "en": ", "}


@dataclass(frozen=True)
class PromptTexts:
    """Texts that prompts are made of."""

    template: str
    """Prompt with `$topics`, `$task_types`, `$num_items`, `$max_input_chars` and
    `$max_output_chars`."""

    topics: tuple[str, ...]
    """Topics to draw from."""

    task_types: tuple[str, ...]
    """Task types to draw from."""

    @property
    def hashes(self) -> dict[str, str]:
        """Hash of each text, by its name."""
        lists = {"topics": self.topics, "task_types": self.task_types}
        joined = {name: "\n".join(lines) for name, lines in lists.items()}
        texts = {"prompt": self.template, **joined}
        return {name: hash_bytes(text.encode()) for name, text in texts.items()}


@dataclass(frozen=True)
class Prompt:
    """Prompt of one request."""

    number: int
    """Number of the request, from 1."""

    text: str
    """Text to send, as the user's only message."""

    max_input_chars: int
    """Longest input that the prompt allows, in characters."""

    max_output_chars: int
    """Longest output that the prompt allows, in characters."""

    sentences: tuple[str, ...]
    """Sentences of the prompt; a row that contains one is copied from the prompt."""


def load_texts(config: PromptConfig) -> PromptTexts:
    """Read the lists that a config names, or the package's own.

    Raises:
        ConfigError: A list cannot be read, repeats a line, or has too few; all problems together.
    """
    problems: list[str] = []
    language = config.language
    topics = _read_list(config.topics, f"topics_{language}.txt", "prompt.topics", problems)
    types = _read_list(
        config.task_types, f"task_types_{language}.txt", "prompt.task_types", problems
    )
    for field, wanted, lines in (
        ("prompt.num_topics", config.num_topics, topics),
        ("prompt.num_task_types", config.num_task_types, types),
    ):
        if lines and len(lines) < wanted:
            problems.append(f"{field}: got {wanted}, but the list has {len(lines)}; lower it")
    if problems:
        raise ConfigError(problems)
    template = (LISTS / f"prompt_{language}.txt").read_text(encoding="utf-8").strip()
    return PromptTexts(template, topics, types)


def build_prompt(config: PromptConfig, texts: PromptTexts, number: int) -> Prompt:
    """Return the prompt of a request.

    Args:
        config: What prompts ask for.
        texts: Texts that they are made of.
        number: Number of the request, from 1.
    """
    # A text as seed: its hash is used, the same in every process and version of Python.
    draws = random.Random(f"{config.seed}/{number}")
    separator = _SEPARATORS[config.language]
    topics = separator.join(draws.sample(texts.topics, config.num_topics))
    task_types = separator.join(draws.sample(texts.task_types, config.num_task_types))
    max_input = draws.randint(*config.input_chars)
    max_output = draws.randint(*config.output_chars)
    text = Template(texts.template).substitute(
        topics=topics,
        task_types=task_types,
        num_items=config.num_items,
        max_input_chars=max_input,
        max_output_chars=max_output,
    )
    pieces = (re.sub(r"^\d+\.\s*", "", piece.strip()) for piece in _SENTENCE_ENDS.split(text))
    shortest = _MIN_SENTENCE_CHARS[config.language]
    sentences = tuple(piece for piece in pieces if len(piece) >= shortest)
    return Prompt(number, text, max_input, max_output, sentences)


def _read_list(path: str | None, own: str, field: str, problems: list[str]) -> tuple[str, ...]:
    """Return the lines of a list, without blank ones; add what is wrong with it to `problems`."""
    file = LISTS / own if path is None else Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{field}: {file} cannot be read as UTF-8 text: {error}")
        return ()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    repeated = sorted({line for line in lines if lines.count(line) > 1})
    if repeated:
        problems.append(f"{field}: {file} repeats {', '.join(repeated)}; remove the copies")
    if not lines:
        problems.append(f"{field}: {file} is empty; wanted one entry per line")
    return tuple(lines)

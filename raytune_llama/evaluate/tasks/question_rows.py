"""Read questions from JSON and JSON Lines: CALM's format, and plain multiple choice."""

from collections.abc import Sequence
from typing import Any

from raytune_llama.chat.conversations import describe_type
from raytune_llama.evaluate.tasks.config import TaskConfig
from raytune_llama.evaluate.tasks.exam_files import check_questions, decode, limit
from raytune_llama.evaluate.tasks.prompts import LETTERS
from raytune_llama.evaluate.tasks.task import Question
from raytune_llama.storage.files import KEY_DECODER, RepeatedKeys

_TEXT_FIELD = {"calm": "query", "choices": "question"}
_ANSWER_FIELDS = {"calm": ("gold", "answer"), "choices": ("answer",)}
_UNUSED = {"calm": ("text",), "choices": ()}
"""Fields that are known and not shown: CALM's `text` is a part of its `query`."""


def read_question_rows(data: bytes, config: TaskConfig) -> tuple[list[Question], list[str]]:
    """Read one file of format `calm` or `choices`: an array of objects, or an object per line.

    Returns:
        The questions and what is wrong.
    """
    text, problem = decode(data)
    if problem:
        return [], [problem]
    rows, problems = _parse(text)
    questions: list[Question] = []
    for number, (where, row) in enumerate(rows):
        question, wrong = _read_row(row, number, config)
        problems += [f"{where}: {one}" for one in wrong]
        if question is not None:
            questions.append(question)
    problems += check_questions(questions) if not problems else []
    return questions, limit(problems)


def _parse(text: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """Return each row with where it is, and what is not JSON."""
    if text.lstrip().startswith("["):
        try:
            array = KEY_DECODER.decode(text.strip())
        except (ValueError, RecursionError) as error:
            return [], [f"invalid JSON ({error})"]
        return [(f"row {number}", row) for number, row in enumerate(array, start=1)], []
    rows: list[tuple[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"line {number}", KEY_DECODER.decode(line.strip())))
            except (ValueError, RecursionError) as error:
                problems.append(f"line {number}: invalid JSON ({error})")
    return rows, problems


def _read_row(row: Any, number: int, config: TaskConfig) -> tuple[Question | None, list[str]]:  # noqa: ANN401 - any JSON value
    """Return the question of a row, or None and what is wrong with it."""
    if not isinstance(row, dict):
        return None, [f"got {describe_type(row)}, wanted an object"]
    assert config.format in ("calm", "choices")
    field, answers = _TEXT_FIELD[config.format], _ANSWER_FIELDS[config.format]
    known = {"id", field, "choices", *answers, *_UNUSED[config.format], *config.ignore_fields}
    problems = [f"unknown field {name!r}; see ignore_fields" for name in row if name not in known]
    if isinstance(row, RepeatedKeys):
        problems += [f"field {name!r} occurs more than once" for name in sorted(row.repeated)]
    text, options, name = row.get(field), row.get("choices"), row.get("id", number)
    if not isinstance(text, str) or not text.strip():
        problems.append(f"{field}: got {text!r}, wanted a text")
    if isinstance(name, bool) or not isinstance(name, str | int):
        problems.append(f"id: got {name!r}, wanted a text or an integer")
    problems += _check_options(options)
    if problems:
        return None, problems
    assert isinstance(text, str)
    assert isinstance(options, list)
    gold, problem = _find_gold(row, answers, options)
    if problem:
        return None, [problem]
    return Question(str(name), text.strip(), tuple(one.strip() for one in options), gold), []


def _check_options(options: Any) -> list[str]:  # noqa: ANN401 - any JSON value
    if not isinstance(options, list) or not all(
        isinstance(option, str) and option.strip() for option in options
    ):
        return [f"choices: got {options!r}, wanted a list of texts"]
    if not 2 <= len(options) <= len(LETTERS):
        return [f"choices: got {len(options)}, wanted 2 to {len(LETTERS)}"]
    if len({option.strip().casefold() for option in options}) < len(options):
        return [f"choices: got {options!r}, of which two are equal"]
    return []


def _find_gold(
    row: dict[str, Any], fields: Sequence[str], options: Sequence[str]
) -> tuple[int | None, str]:
    """Return the index of the right option; None and what is wrong, if there is none."""
    given = {name: row[name] for name in fields if row.get(name) is not None}
    if not given:
        return None, f"no field {' or '.join(fields)}"
    found = {name: _index_of(value, options) for name, value in given.items()}
    for name, index in found.items():
        if index is None:
            return None, (
                f"{name}: got {given[name]!r}, which is no index, letter or text of {options!r}"
            )
    if len(set(found.values())) > 1:
        shown = ", ".join(f"{name} {value!r}" for name, value in given.items())
        return None, f"{shown} are different choices of {options!r}"
    return next(iter(found.values())), ""


def _index_of(value: Any, options: Sequence[str]) -> int | None:  # noqa: ANN401 - any JSON value
    """Return the option that a right answer means: an index from 0, a text, or a letter."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < len(options) else None
    if not isinstance(value, str):
        return None
    name = value.strip().casefold()
    folded = [option.strip().casefold() for option in options]
    if name in folded:
        return folded.index(name)
    letters = LETTERS[: len(options)].casefold()
    return letters.index(name) if len(name) == 1 and name in letters else None

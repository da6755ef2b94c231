"""Read the CSV files of C-Eval and CMMLU."""

import csv
import io
from collections.abc import Iterator, Sequence

from raytune_llama.data.readers.encodings import HEAD_BYTES, detect_encoding
from raytune_llama.evaluate.tasks.task import Question

_OPTIONS = ("a", "b", "c", "d")
_REQUIRED = ("question", *_OPTIONS)
_IDS = ("id", "", "unnamed: 0")
"""Columns that number the rows: C-Eval's, and CMMLU's as it is and as pandas renames it."""
_UNUSED = ("explanation",)
"""Columns that are known and not shown: C-Eval's explanations of its examples."""
_MAX_SHOWN = 5


def read_exam_file(data: bytes) -> tuple[list[Question], list[str]]:
    """Read one CSV file with the columns `question`, `A` to `D`, and maybe `id` and `answer`.

    Column names are read without regard to case. Without a column of ids, rows are numbered from 0.

    Returns:
        The questions, without right answers if there is no such column, and what is wrong.
    """
    text, problem = decode(data)
    if problem:
        return [], [problem]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        problems = _check_columns(names)
        if problems:
            return [], problems
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        return [], [f"line {reader.line_num}: invalid CSV ({error})"]
    questions: list[Question] = []
    for number, (line, cells) in enumerate(rows):
        if len(cells) != len(names):
            problems.append(f"line {line}: {len(cells)} columns, the header has {len(names)}")
            continue
        question = _read_row(dict(zip(names, map(str.strip, cells), strict=True)), number)
        if isinstance(question, str):
            problems.append(f"line {line}: {question}")
        else:
            questions.append(question)
    problems += check_questions(questions) if not problems else []
    return questions, limit(problems)


def _check_columns(names: Sequence[str]) -> list[str]:
    missing = [name.upper() if len(name) == 1 else name for name in _REQUIRED if name not in names]
    known = {*_REQUIRED, "answer", *_IDS, *_UNUSED}
    unknown = [name for name in names if name not in known]
    repeated = sorted({name for name in names if names.count(name) > 1})
    problems: list[str] = []
    if not names:
        return ["the file is empty"]
    if missing:
        problems.append(f"no column {', '.join(missing)}; columns are {', '.join(names)}")
    if unknown:
        problems.append(f"unknown column {', '.join(unknown)}; remove it from the file")
    if repeated:
        problems.append(f"several columns are named {', '.join(map(repr, repeated))}")
    return problems


def _read_row(row: dict[str, str], number: int) -> Question | str:
    """Return the question of a row, or what is wrong with it."""
    if not row["question"]:
        return "the question is empty"
    identifier = next((row[name] for name in _IDS if name in row), str(number))
    gold = None
    if "answer" in row:
        letter = row["answer"].upper()
        if letter not in ("A", "B", "C", "D"):
            return f"answer is {row['answer']!r}, wanted A, B, C or D"
        gold = "ABCD".index(letter)
    return Question(identifier, row["question"], tuple(row[name] for name in _OPTIONS), gold)


def decode(data: bytes) -> tuple[str, str]:
    """Decode UTF-8 with or without a byte order mark; return the text, or what is wrong."""
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        guess = ""
        try:
            found = detect_encoding(data[:HEAD_BYTES], "auto")
            guess = found.codec if found.codec != "utf-8" else ""
        except ValueError:  # such as UTF-16 without a mark
            pass
        looks = f"; it looks like {guess}" if guess else ""
        source = guess or "ENCODING"
        return "", (
            f"not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}{looks}); convert it: "
            f"iconv -f {source} -t utf-8"
        )


def check_questions(questions: Sequence[Question]) -> list[str]:
    """Return what is wrong with a file's questions as a whole: none, or ids that repeat."""
    if not questions:
        return ["no questions"]
    return [f"id {name!r} occurs more than once" for name in _repeated(questions)]


def _repeated(questions: Sequence[Question]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for question in questions:
        seen[question.id] = seen.get(question.id, 0) + 1
        if seen[question.id] == 2:
            yield question.id


def limit(problems: list[str]) -> list[str]:
    """Return the first problems of a file, and the number of the others."""
    if len(problems) <= _MAX_SHOWN:
        return problems
    return [*problems[:_MAX_SHOWN], f"and {len(problems) - _MAX_SHOWN} more"]

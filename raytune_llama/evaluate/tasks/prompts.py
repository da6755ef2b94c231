"""Text of questions, options and examples, as a model reads them."""

# ruff: noqa: RUF001  # Chinese punctuation

import re
import string

from raytune_llama.evaluate.tasks.config import TaskFormat
from raytune_llama.evaluate.tasks.task import EvaluationTask, Question

LETTERS = string.ascii_uppercase
"""Letters of options, in order."""

_PROMPTS: dict[tuple[TaskFormat | None, str], str] = {
    ("ceval", "letters"): "{question}\n{options}\n答案：",
    ("cmmlu", "letters"): "{question}\n{options}\n答案：",
    ("calm", "texts"): "{question}",
    ("choices", "letters"): "{question}\n{options}\nAnswer:",
    ("choices", "texts"): "{question}\nAnswer:",
}
_DESCRIPTIONS: dict[TaskFormat | None, str] = {
    "ceval": "以下是关于{subject}的单项选择题，每题只有一个正确答案，请给出它的字母。",
    "cmmlu": "以下是关于{subject}的单项选择题，每题只有一个正确答案，请给出它的字母。",
}


def render_question(task: EvaluationTask, question: Question) -> str:
    """Return a question in the form of its benchmark, up to where the answer begins."""
    config = task.config
    prompt = config.prompt or _PROMPTS[config.format, config.option_style]
    listed = "\n".join(
        f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False)
    )
    # In one pass, as a question may contain such names in braces.
    values = {"{question}": question.text, "{options}": listed}
    return re.sub(r"\{(?:question|options)\}", lambda match: values[match[0]], prompt)


def render_description(task: EvaluationTask) -> str:
    """Return the text before the first example or question; empty if there is none."""
    text = task.config.description
    if text is None:
        text = _DESCRIPTIONS.get(task.config.format, "")
    return text.replace("{subject}", task.title)


def answer_label(task: EvaluationTask, question: Question, index: int) -> str:
    """Return what an option is called in an answer: its letter, or its text."""
    return LETTERS[index] if task.config.option_style == "letters" else question.options[index]


def answer_labels(task: EvaluationTask, question: Question) -> tuple[str, ...]:
    """Return `answer_label` of all options of a question."""
    return tuple(answer_label(task, question, index) for index in range(len(question.options)))


def render_example(task: EvaluationTask, question: Question) -> tuple[str, str]:
    """Return an example's question and its right answer.

    The answer begins with a space after a cue in Latin script such as `Answer:`, not after a
    Chinese one, nor in a chat template, where it is a turn of its own.
    """
    assert question.gold is not None, "examples are checked to have answers"
    text, answer = render_question(task, question), answer_label(task, question, question.gold)
    is_joined = task.config.chat_template or not text[-1:].isascii() or text[-1:].isspace()
    return text, answer if is_joined else f" {answer}"

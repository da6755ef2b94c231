"""Options of prompts: values of the variables that a Jinja chat template reads.

A template may read more than the messages, such as `enable_thinking`. A request may set these
variables; training sets none.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from raytune_llama.chat.conversations import find_text_defect
from raytune_llama.config.errors import UserError

OPTIONS_FIELD = "chat_template_kwargs"
"""Field of a request with the options, for error messages."""


class _GenerationTag(Extension):
    """The tag around answers that `transformers` adds to Jinja; its content is rendered."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def find_variables(text: str) -> frozenset[str]:
    """Return the names that a template reads and does not define itself.

    Raises:
        jinja2.TemplateError: The template is not valid.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_GenerationTag, loopcontrols])
    return frozenset(find_undeclared_variables(environment.parse(text)))


def check_options(options: Mapping[str, Any], variables: frozenset[str]) -> None:
    """Check that a template reads all options, and that their texts can be encoded.

    Raises:
        UserError: It does not read one, or a text has a defect; the error names the option.
    """
    known = ", ".join(sorted(variables))
    for name, value in options.items():
        if name not in variables:
            wanted = f"it has {known}" if known else "it has none; omit the field"
            raise UserError(
                f"{OPTIONS_FIELD}: {name[:80]!r} is no variable of the chat template; {wanted}"
            )
        for text in find_texts(value):
            defect = find_text_defect(text, f"{OPTIONS_FIELD}.{name}")
            if defect is not None:
                raise UserError(defect.detail)


def find_texts(value: object) -> Iterator[str]:
    """Yield the strings in a JSON value, names of fields included."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            rest += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            rest += one

"""A chat in a terminal, or one question from a pipe, with any OpenAI endpoint."""

import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Any, TextIO
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings
from raytune_llama.serve.client.endpoint import (
    ChatClient,
    EndpointError,
    RequestRejectedError,
    StreamEnd,
)
from raytune_llama.storage.files import json_bytes

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

HELP = """\
/clear        begin a new conversation
/system TEXT  tell the model how to answer; without TEXT, nothing
/model NAME   ask another model; without NAME, show which there are
/usage        show the counts of the last answer
/save FILE    write the conversation as JSON
/help         show this
Ctrl-C stops an answer. Ctrl-C or Ctrl-D at the prompt ends. Begin a message that starts with / with
a space."""


@settings
class TerminalConfig:
    """A chat with an endpoint; its key is in the environment variable OPENAI_API_KEY."""

    url: str = "http://127.0.0.1:8000/v1"
    """Address of the API, up to /v1."""

    model: Annotated[str, Field(min_length=1)] | None = None
    """Model, or model:adapter; null: the endpoint's only one, or one chosen from its list."""

    system: str | None = None
    """How the model is to answer; null: as its template says."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """0: always the likeliest token. Null, here and below: the endpoint's own."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Part of the probability that is drawn from."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    """How many of the likeliest tokens are drawn from; not every endpoint knows it."""

    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    """Above 1: tokens that are there already become less likely; not every endpoint knows it."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """New tokens of an answer, at most."""

    seed: int | None = None
    """The same seed gives the same answer, where the endpoint keeps to it."""

    usage: bool = False
    """Show tokens and speed after each answer, on stderr."""

    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Silence of the endpoint after which an answer is given up."""

    @model_validator(mode="after")
    def _check(self) -> "TerminalConfig":
        try:
            parts = urlsplit(self.url)
            is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:  # brackets that don't close, a port that is none
            is_url, parts = False, urlsplit("")
        if not is_url:
            raise ConfigError([f"url: got {self.url!r}, wanted such as http://127.0.0.1:8000/v1"])
        if parts.username or parts.password:
            raise ConfigError(["url: has a password; set OPENAI_API_KEY instead"])
        return self


class Chat:
    """A conversation, its model, and the settings of its answers."""

    def __init__(self, client: ChatClient, config: TerminalConfig, model: str) -> None:
        self.model, self.system = model, config.system
        self.turns: list[dict[str, str]] = []
        self.counts = "no answer yet"
        self._client = client
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed")
        given = {name: getattr(config, name) for name in names}
        self._sampling = {name: value for name, value in given.items() if value is not None}

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as it is sent."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self.turns

    def ask(self, question: str) -> Generator[str]:
        """Yield the answer's pieces; keep question and answer, where anything came.

        Raises:
            EndpointError: there is no answer, or it is broken off.
            RefusedError: the endpoint refuses the request.
        """
        asked = {"role": "user", "content": question}
        request: dict[str, Any] = {"model": self.model, "messages": [*self.messages, asked]}
        came, ends = "", False
        start, first = time.monotonic(), 0.0
        try:
            with closing(self._client.stream({**request, **self._sampling})) as items:
                for item in items:
                    if isinstance(item, StreamEnd):
                        ends = True
                        self.counts = _counts(item, start, first, time.monotonic())
                        continue
                    first = first or time.monotonic()
                    came += item
                    yield item
        finally:
            if not ends:
                self.counts = "no counts: the answer was broken off"
            if came or ends:
                self.turns += [asked, {"role": "assistant", "content": came}]


def _counts(end: StreamEnd, start: float, first: float, now: float) -> str:
    if end.prompt_tokens is None or end.completion_tokens is None:
        facts = ["the endpoint does not count tokens"]
    else:
        facts = [f"tokens: {end.prompt_tokens} read, {end.completion_tokens} written"]
        if end.completion_tokens > 1 and first and now > first:
            facts.append(f"{(end.completion_tokens - 1) / (now - first):.3g} tokens/s")
    facts += [f"first after {first - start:.2f} s"] if first else []
    facts += ["cut off at the limit of tokens"] if end.finish_reason == "length" else []
    return ", ".join(facts)


def run_chat(
    config: TerminalConfig, key: str | None, source: TextIO, out: TextIO, notes: TextIO
) -> int:
    """Chat until the user ends; or answer once, where questions or answers are no terminal's.

    Args:
        config: what is asked, and how.
        key: of the endpoint.
        source: questions; standard input, where it is a terminal.
        out: answers, and nothing else where it is no terminal.
        notes: everything else that is said.

    Returns:
        Exit status: 0; 1 where the endpoint has failed; 2 where it refused; `EXIT_INTERRUPTED`.
    """
    parts = urlsplit(config.url)
    is_near = (parts.hostname or "") in {"localhost", "127.0.0.1", "::1"}
    if key is not None and parts.scheme == "http" and not is_near:
        notes.write(f"warning: the key goes to {parts.hostname} in clear; use https\n")
    try:
        with closing(ChatClient(config.url, key, timeout_seconds=config.timeout_seconds)) as client:
            if not (source.isatty() and out.isatty()):
                return _answer_once(client, config, source, out, notes)
            return _Terminal(client, config, out, notes).run()
    except RequestRejectedError as error:
        notes.write(f"{_visible(str(error))}\n")
        return 2
    except EndpointError as error:
        notes.write(f"{_visible(str(error))}\n")
        return 1


def _answer_once(
    client: ChatClient, config: TerminalConfig, source: TextIO, out: TextIO, notes: TextIO
) -> int:
    try:
        question = _read_question(source)
        model = config.model or _only_model(client)
        chat = Chat(client, config, model)
        show: Callable[[str], str] = _visible if out.isatty() else str
        with closing(chat.ask(question)) as pieces:
            for piece in pieces:
                out.write(show(piece))
                out.flush()
    except KeyboardInterrupt:
        notes.write("\nstopped\n")
        return EXIT_INTERRUPTED
    out.write("\n")
    out.flush()
    if config.usage:
        notes.write(f"{chat.counts}\n")
    return 0


def _read_question(source: TextIO) -> str:
    try:
        question = source.read().strip()
        question.encode()  # Python reads wrong bytes as lone surrogates in some locales
    except UnicodeError as error:
        raise RequestRejectedError(f"stdin is no UTF-8 text: {error}") from error
    if not question:
        raise RequestRejectedError("stdin holds no question")
    return question


def _only_model(client: ChatClient) -> str:
    names = client.list_models()
    if len(names) != 1:
        raise RequestRejectedError(
            f"model: set it to one of: {', '.join(names) or '(there is none)'}"
        )
    return names[0]


class _Terminal:
    """A chat with a person at a terminal."""

    def __init__(
        self, client: ChatClient, config: TerminalConfig, out: TextIO, notes: TextIO
    ) -> None:
        self._client, self._config, self._out, self._notes = client, config, out, notes

    def run(self) -> int:
        """Chat until the user ends."""
        # Not in every build of Python; `input` does without.
        with suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit lines and recall them
        try:
            chat = Chat(self._client, self._config, self._config.model or self._choose())
            self._say(f"{chat.model}; /help lists the commands")
            while True:
                line = input("> ")
                if line.startswith("/"):
                    self._command(chat, *line[1:].strip().partition(" ")[::2])
                elif line.strip():
                    self._answer(chat, line.strip())
        except (EOFError, KeyboardInterrupt):
            self._out.write("\n")
            return 0

    def _say(self, text: str) -> None:
        self._out.write(f"{_visible(text)}\n")
        self._out.flush()

    def _choose(self) -> str:
        names = self._client.list_models()
        if not names:
            raise RequestRejectedError("the endpoint has no model")
        if len(names) == 1:
            return names[0]
        for number, name in enumerate(names, start=1):
            self._say(f"{number:3} {name}")
        while True:
            chosen = input(f"model, 1 to {len(names)}: ").strip()
            if chosen in names:
                return chosen
            if chosen.isdecimal() and 1 <= int(chosen) <= len(names):
                return names[int(chosen) - 1]

    def _answer(self, chat: Chat, question: str) -> None:
        try:
            with closing(chat.ask(question)) as pieces:
                for piece in pieces:
                    self._out.write(_visible(piece))
                    self._out.flush()
            self._say("")
        except KeyboardInterrupt:
            self._say("\n(stopped)")
        except (EndpointError, RequestRejectedError) as error:
            self._say(f"\n{error}")
            return
        if self._config.usage:
            self._notes.write(f"({chat.counts})\n")

    def _command(self, chat: Chat, name: str, value: str) -> None:
        value = value.strip()
        match name:
            case "clear":
                chat.turns.clear()
                self._say("a new conversation")
            case "system":
                chat.system = value or None
                self._say("from the next answer on" if value else "no system message any more")
            case "model":
                self._switch(chat, value)
            case "usage":
                self._say(chat.counts)
            case "save":
                self._save(chat, value)
            case "help":
                self._say(HELP)
            case _:
                self._say(f"no command /{name}\n{HELP}")

    def _switch(self, chat: Chat, value: str) -> None:
        try:
            names = self._client.list_models()
        except (EndpointError, RequestRejectedError) as error:
            self._say(str(error))
            return
        if value in names:
            chat.model = value
            self._say(f"{value} from the next answer on")
            return
        if value:
            self._say(f"no model {value}; there is")
        for name in names:
            self._say(f"{'*' if name == chat.model else ' '} {name}")

    def _save(self, chat: Chat, value: str) -> None:
        if not value:
            self._say("write /save FILE")
            return
        path = Path(value).expanduser()
        try:
            with path.open("xb") as file:
                file.write(json_bytes({"model": chat.model, "messages": chat.messages}))
        except OSError as error:
            self._say(f"not saved: {error}")
            return
        self._say(f"{len(chat.messages)} messages: {path}")


def _visible(text: str) -> str:
    """Return text without what a terminal obeys: a model's control characters are shown, not done.

    An escape sequence could rewrite the screen or reach the clipboard.
    """
    return "".join(
        one if one in "\n\t" or one.isprintable() or one > "\x9f" else f"\\x{ord(one):02x}"
        for one in text
    )

"""Chat in a terminal, or with questions from a pipe.

`run_chat` is a client of any OpenAI-compatible endpoint; `converse` is the same chat with any other
source of answers, such as a model in this process.
"""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import urlsplit

from raytune_llama.serve.client.config import TerminalConfig
from raytune_llama.serve.client.endpoint import (
    ChatClient,
    EndpointError,
    RequestRejectedError,
    StreamEnd,
)
from raytune_llama.storage.files import json_bytes

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""

HELP = """\
/clear        start a new conversation
/system TEXT  set the system message; without TEXT, remove it
/model NAME   switch to another model; without NAME, list the models
/usage        show the token counts of the last response
/save FILE    save the conversation as JSON
/help         show this help
Ctrl-C stops a response. Ctrl-C or Ctrl-D at the prompt exits. To send a message that starts with /,
put a space before it."""


class AnswerSource(Protocol):
    """Answers conversations, as `ChatClient` does."""

    def list_models(self) -> list[str]:
        """Return the names of the models; see `ChatClient.list_models`."""
        ...

    def stream(self, request: Mapping[str, Any]) -> Generator[str | StreamEnd]:
        """Yield the text of a chat completion, then its end; see `ChatClient.stream`."""
        ...


class Chat:
    """A conversation with its model and sampling parameters."""

    def __init__(self, client: AnswerSource, config: TerminalConfig, model: str) -> None:
        self.model, self.system = model, config.system
        self.turns: list[dict[str, str]] = []
        self.counts = "no response yet"
        self._client = client
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed")
        given = {name: getattr(config, name) for name in names}
        self._sampling = {name: value for name, value in given.items() if value is not None}

    @property
    def messages(self) -> list[dict[str, str]]:
        """Messages to send, system message included."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self.turns

    def ask(self, question: str) -> Generator[str]:
        """Yield the response's text as it arrives; record question and response if any arrived.

        Raises:
            EndpointError: there is no response, or it was interrupted.
            RequestRejectedError: the endpoint rejected the request.
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
                self.counts = "no token counts: the response was interrupted"
            if came or ends:
                self.turns += [asked, {"role": "assistant", "content": came}]


def _counts(end: StreamEnd, start: float, first: float, now: float) -> str:
    if end.prompt_tokens is None or end.completion_tokens is None:
        facts = ["the endpoint does not report token counts"]
    else:
        facts = [f"tokens: {end.prompt_tokens} prompt, {end.completion_tokens} completion"]
        if end.completion_tokens > 1 and first and now > first:
            facts.append(f"{(end.completion_tokens - 1) / (now - first):.3g} tokens/s")
    facts += [f"first token after {first - start:.2f} s"] if first else []
    facts += ["truncated at the token limit"] if end.finish_reason == "length" else []
    return ", ".join(facts)


def run_chat(
    config: TerminalConfig, key: str | None, source: TextIO, out: TextIO, notes: TextIO
) -> int:
    """Chat until the user exits; if `source` or `out` is not a terminal, send one question.

    Args:
        config: endpoint and sampling parameters.
        key: API key of the endpoint; None: no key.
        source: input with the question; standard input if interactive.
        out: output of the responses, and of nothing else if it is not a terminal.
        notes: output of warnings, errors and usage.

    Returns:
        Exit status: 0; 1 if the endpoint failed; 2 if it rejected the request; `EXIT_INTERRUPTED`.
    """
    parts = urlsplit(config.url)
    is_near = (parts.hostname or "") in {"localhost", "127.0.0.1", "::1"}
    if key is not None and parts.scheme == "http" and not is_near:
        notes.write(f"warning: the API key is sent to {parts.hostname} unencrypted; use https\n")
    try:
        with closing(ChatClient(config.url, key, timeout_seconds=config.timeout_seconds)) as client:
            if not (source.isatty() and out.isatty()):
                return _answer_once(client, config, source, out, notes)
            return _Terminal(client, config, source, out, notes).run()
    except RequestRejectedError as error:
        notes.write(f"{_visible(str(error))}\n")
        return 2
    except EndpointError as error:
        notes.write(f"{_visible(str(error))}\n")
        return 1


def converse(
    answers: AnswerSource, config: TerminalConfig, source: TextIO, out: TextIO, notes: TextIO
) -> int:
    """Chat until an empty line or the end of the input; each line is a message.

    Args:
        answers: source of the answers.
        config: sampling parameters; its `url` is not used.
        source: input with the messages; standard input if it is a terminal.
        out: output of the answers, and of nothing else if `source` is not a terminal.
        notes: output of usage and, if `source` is not a terminal, of errors.

    Returns:
        Exit status: 0.
    """
    return _Terminal(answers, config, source, out, notes, ends_at_empty_line=True).run()


def _answer_once(
    client: ChatClient, config: TerminalConfig, source: TextIO, out: TextIO, notes: TextIO
) -> int:
    try:
        question = _read_question(source)
        model = config.model or _only_model(client)
        chat = Chat(client, config, model)
        show: Callable[[str], str] = _visible if out.isatty() else str
        with closing(chat.ask(question)) as chunks:
            for chunk in chunks:
                out.write(show(chunk))
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
        raise RequestRejectedError(f"stdin is not UTF-8 text: {error}") from error
    if not question:
        raise RequestRejectedError("stdin contains no question")
    return question


def _only_model(client: ChatClient) -> str:
    names = client.list_models()
    if len(names) != 1:
        raise RequestRejectedError(
            f"model: set it to one of: {', '.join(names) or '(none available)'}"
        )
    return names[0]


class _Terminal:
    """Interactive chat at a terminal, or with a line per message from a pipe."""

    def __init__(
        self,
        client: AnswerSource,
        config: TerminalConfig,
        source: TextIO,
        out: TextIO,
        notes: TextIO,
        *,
        ends_at_empty_line: bool = False,
    ) -> None:
        self._client, self._config, self._out, self._notes = client, config, out, notes
        self._source, self._ends_at_empty_line = source, ends_at_empty_line
        # Of a pipe, only answers are written to `out`, as they are.
        self._is_piped = not (source.isatty() and out.isatty())

    def run(self) -> int:
        """Chat until the user exits; return the exit status."""
        if not self._is_piped:
            # Not in every build of Python; `input` works without it.
            with suppress(ImportError):
                import readline  # noqa: F401  # lets `input` edit lines and recall them
        try:
            chat = Chat(self._client, self._config, self._config.model or self._choose())
            self._say(f"{chat.model}; /help lists the commands")
            while True:
                line = self._read_line()
                if line.startswith("/"):
                    self._command(chat, *line[1:].strip().partition(" ")[::2])
                elif line.strip():
                    self._answer(chat, line.strip())
                elif self._ends_at_empty_line:
                    return 0
        except (EOFError, KeyboardInterrupt):
            if not self._is_piped:
                self._out.write("\n")
            return 0

    def _read_line(self) -> str:
        """Return the next line; raise EOFError at the end."""
        if not self._is_piped:
            return input("> ")
        line = self._source.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _say(self, text: str) -> None:
        """Write a line about the chat."""
        out = self._notes if self._is_piped else self._out
        out.write(f"{_visible(text)}\n")
        out.flush()

    def _choose(self) -> str:
        names = self._client.list_models()
        if not names:
            raise RequestRejectedError("the endpoint has no models")
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
            with closing(chat.ask(question)) as chunks:
                for chunk in chunks:
                    self._out.write(chunk if self._is_piped else _visible(chunk))
                    self._out.flush()
            self._out.write("\n")
            self._out.flush()
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
                self._say("started a new conversation")
            case "system":
                chat.system = value or None
                self._say("system message set" if value else "system message removed")
            case "model":
                self._switch(chat, value)
            case "usage":
                self._say(chat.counts)
            case "save":
                self._save(chat, value)
            case "help":
                self._say(HELP)
            case _:
                self._say(f"unknown command /{name}\n{HELP}")

    def _switch(self, chat: Chat, value: str) -> None:
        try:
            names = self._client.list_models()
        except (EndpointError, RequestRejectedError) as error:
            self._say(str(error))
            return
        if value in names:
            chat.model = value
            self._say(f"switched to {value}")
            return
        if value:
            self._say(f"unknown model {value}; available models:")
        for name in names:
            self._say(f"{'*' if name == chat.model else ' '} {name}")

    def _save(self, chat: Chat, value: str) -> None:
        if not value:
            self._say("usage: /save FILE")
            return
        path = Path(value).expanduser()
        try:
            with path.open("xb") as file:
                file.write(json_bytes({"model": chat.model, "messages": chat.messages}))
        except OSError as error:
            self._say(f"not saved: {error}")
            return
        self._say(f"saved {len(chat.messages)} messages to {path}")


def _visible(text: str) -> str:
    """Return text with its control characters escaped, so that a terminal does not execute them.

    A model's escape sequence could rewrite the screen or access the clipboard.
    """
    return "".join(
        one if one in "\n\t" or one.isprintable() or one > "\x9f" else f"\\x{ord(one):02x}"
        for one in text
    )

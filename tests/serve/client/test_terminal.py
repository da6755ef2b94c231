"""The terminal client as a person uses it: its program, against the real server."""

import json
import os
import pty
import select
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_llama.serve.errors import BusyError, EngineError
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.http.keys import ApiKeys, make_key
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_routes import Here, Server

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, str(ROOT / "jobs" / "chat.py")]
SECONDS = 120.0
"""Longest wait for what must come; a busy machine is no failure."""


def environment(key: str | None) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    own |= {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
    return own if key is None else own | {"OPENAI_API_KEY": key}


def pipe(
    port: int, question: str | bytes, *arguments: str, key: str | None = None
) -> tuple[int, str, str]:
    """Ask through a pipe; return status, stdout and stderr."""
    done = subprocess.run(
        [*COMMAND, f"url=http://127.0.0.1:{port}/v1", *arguments],
        input=question.encode() if isinstance(question, str) else question,
        capture_output=True,
        check=False,
        env=environment(key),
        timeout=SECONDS,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Terminal:
    """The program at a terminal of its own."""

    def __init__(self, port: int, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            # The terminal is its own: Ctrl-C there is a signal to it alone.
            ["setsid", "--ctty", *COMMAND, f"url=http://127.0.0.1:{port}/v1", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(None),
        )
        os.close(slave)
        self._seen = ""

    def see(self, text: str) -> str:
        """Await a text on the screen; return what stood before it."""
        deadline = time.monotonic() + SECONDS
        while text not in self._seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come: {self._seen!r}"
            if select.select([self._master], [], [], min(left, 1.0))[0]:
                self._seen += os.read(self._master, 65536).decode(errors="replace")
        before, _, self._seen = self._seen.partition(text)
        return before.replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self, key: str) -> int:
        """Press a key at the prompt until the program ends; return its status.

        Python's readline loses a Ctrl-C that comes within a moment of the prompt.
        """
        deadline = time.monotonic() + SECONDS
        while True:
            self.type(key)
            try:
                status = self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                assert time.monotonic() < deadline
            else:
                os.close(self._master)
                return status


@pytest.fixture(scope="module")
def models() -> dict[str, Scripted]:
    return {
        "plain": Scripted("one ", "two"),
        "held": Scripted("one ", "two ", "three", held=True),
        "escaping": Scripted("a\x1b]52;c;eA==\x07b\n人\t\x9b1mc"),
        "busy": Scripted(error=BusyError("9 requests are waiting already")),
        "broken": Scripted("half an ", "answer", error=EngineError("the engine has failed")),
        "gone": Scripted("half an ", "answer", error=OSError("a cable")),
    }


@pytest.fixture(scope="module")
def port(models: dict[str, Scripted], answerer: CompletionService) -> Iterator[int]:
    server = Server({"tiny": Here(answerer), **models})
    yield server.port
    server.close()


def test_pipe_answers_once_with_nothing_else_on_stdout(
    port: int, models: dict[str, Scripted]
) -> None:
    fields = ("temperature=0.5", "max_tokens=7", "seed=3", "top_k=5", "system=Be brief.")
    status, out, notes = pipe(port, "  the fox\n", "model=plain", *fields)
    assert (status, out, notes) == (0, "one two\n", "")
    assert models["plain"].messages == [("system", "Be brief."), ("user", "the fox")]
    asked = models["plain"].fields
    assert {name: asked.get(name) for name in ("temperature", "max_tokens", "seed", "top_k")} == {
        "temperature": 0.5,
        "max_tokens": 7,
        "seed": 3,
        "top_k": 5,
    }
    assert not {"top_p", "repetition_penalty"} & set(asked)


def test_pipe_shows_usage_where_asked(port: int) -> None:
    arguments = ("model=tiny", "temperature=0", "max_tokens=5", "usage=true")
    status, out, notes = pipe(port, "the fox", *arguments)
    assert status == 0
    assert out.strip()
    assert "5 completion" in notes
    assert "truncated at the token limit" in notes


@pytest.mark.parametrize(
    ("arguments", "question", "status", "problem"),
    [
        ((), "x", 2, "model: set it to one of: tiny, plain, held"),
        (("model=gpt-9",), "x", 2, "returned 404: The model `gpt-9` does not exist"),
        (("model=plain", "temperature=3"), "x", 2, "temperature"),
        (("model=plain",), " \n", 2, "stdin contains no question"),
        (("model=plain",), b"\xff\xfe", 2, "stdin is not UTF-8 text"),
        (("model=tiny",), "word " * 500, 2, "is 128 tokens"),
        (("model=busy",), "x", 1, "try again in 1 s"),
        (("model=broken",), "x", 1, "the engine has failed"),
        (("model=gone",), "x", 1, "connection lost"),
    ],
)
def test_pipe_fails_with_status_and_reason(
    port: int, arguments: tuple[str, ...], question: str | bytes, status: int, problem: str
) -> None:
    found, _, notes = pipe(port, question, *arguments)
    assert found == status
    assert problem in notes
    assert "Traceback" not in notes


def test_mistakes_in_the_config_are_told_at_once() -> None:
    done = subprocess.run(
        [*COMMAND, "url=ftp://x", "top_p=2", "modle=x"], capture_output=True, check=False, text=True
    )
    assert done.returncode == 2
    for problem in ("top_p: got 2", "did you mean model?"):
        assert problem in done.stderr
    for url in ("ftp://x", "http://", "http://[::1", "http://x:99999", "http://a:b@x/v1"):
        done = subprocess.run(
            [*COMMAND, f"url='{url}'"], capture_output=True, check=False, text=True
        )
        assert done.returncode == 2, url
        assert done.stderr.startswith("url: ")


def test_key_is_taken_from_the_environment_and_never_shown(models: dict[str, Scripted]) -> None:
    (key, line), (other, _) = make_key(), make_key()
    server = Server({"plain": models["plain"]}, ApiKeys((bytes.fromhex(line),)))
    try:
        assert pipe(server.port, "x", key=key) == (0, "one two\n", "")
        for wrong in (other, None):
            status, out, notes = pipe(server.port, "x", "model=plain", key=wrong)
            assert (status, out) == (2, "")
            assert "OPENAI_API_KEY" in notes
            assert other not in notes
        status, _, notes = pipe(server.port, "x", key="two words")
        assert status == 2
        assert "two words" not in notes
    finally:
        server.close()


def test_endpoint_that_is_not_there_is_named() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]  # bound, and nobody listens
        status, _, notes = pipe(port, "x", "model=plain")
    assert status == 1
    assert f"http://127.0.0.1:{port}/v1 can't be reached" in notes


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\n\r\n<hi> ", "returned 502: <hi>"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n", "returned 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi", "text/html"),
        (b"nonsense\r\n\r\n", "connection lost"),
        (b"", "connection lost"),
        (
            b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {"x": 1}\n\n',
            "sent an invalid chunk",
        ),
        (
            b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {"choices": []}\n\n',
            "closed before the response was complete",
        ),
    ],
)
def test_server_that_speaks_otherwise_is_told(answer: bytes, problem: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        status, _, notes = pipe(listener.getsockname()[1], "x", "model=m")
        thread.join(SECONDS)
    assert status == 1
    assert problem in notes
    assert "Traceback" not in notes


def test_reader_of_the_answer_may_go_away(port: int) -> None:
    command = shlex.join([*COMMAND, f"url=http://127.0.0.1:{port}/v1", "model=plain"])
    done = subprocess.run(
        ["bash", "-c", f"echo x | {command} | true; echo ${{PIPESTATUS[1]}}"],
        capture_output=True,
        check=False,
        text=True,
        env=environment(None),
        timeout=SECONDS,
    )
    assert done.stdout.strip() in {"0", "1"}
    assert done.stderr == ""


def test_ctrl_c_stops_the_answer_and_frees_its_slot_then_the_chat_goes_on(
    port: int, models: dict[str, Scripted]
) -> None:
    held = models["held"]
    terminal = Terminal(port, "model=held")
    terminal.see("> ")
    terminal.type("first\n")
    terminal.see("one ")
    held.let()
    terminal.see("two ")
    assert held.num_running == 1
    terminal.type("\x03")
    terminal.see("(stopped)")
    terminal.see("> ")
    deadline = time.monotonic() + SECONDS
    while held.num_running:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    terminal.type("/model plain\n")
    terminal.see("> ")
    terminal.type("second\n")
    assert "one two" in terminal.see("> ")
    assert models["plain"].messages == [
        ("user", "first"),
        ("assistant", "one two "),
        ("user", "second"),
    ]
    assert terminal.end("\x03") == 0


def test_commands_change_the_conversation(
    port: int, models: dict[str, Scripted], tmp_path: Path
) -> None:
    terminal = Terminal(port)
    assert "2 plain" in terminal.see("model, 1 to 7: ")
    terminal.type("99\n")
    terminal.see("model, 1 to 7: ")
    terminal.type("2\n")
    terminal.see("> ")

    def told(line: str) -> str:
        terminal.type(line + "\n")
        return terminal.see("\n> ")

    assert "no response yet" in told("/usage")
    told("/system Be brief.")
    told("first")
    told(" /not a command")
    plain = models["plain"]
    conversation = [
        ("system", "Be brief."),
        ("user", "first"),
        ("assistant", "one two"),
        ("user", "/not a command"),
    ]
    assert plain.messages == conversation
    assert "3 prompt, 2 completion" in told("/usage")
    file = tmp_path / "saved.json"
    assert "5 messages" in told(f"/save {file}")
    saved = json.loads(file.read_text())["messages"]
    assert [(one["role"], one["content"]) for one in saved] == [
        *conversation,
        ("assistant", "one two"),
    ]
    assert "not saved" in told(f"/save {file}")  # never over another file
    assert "unknown model nobody; available models:" in told("/model nobody")
    assert "unknown command /nothing" in told("/nothing")
    told("/clear")
    told("/system")
    told("anew")
    assert plain.messages == [("user", "anew")]
    told("/model busy")
    assert "try again in 1 s" in told("refused")
    told("/model plain")
    told("after")
    # What was refused is no part of the conversation.
    assert plain.messages == [("user", "anew"), ("assistant", "one two"), ("user", "after")]
    assert terminal.end("\x04") == 0


def test_control_characters_of_a_model_are_shown_and_not_done(port: int) -> None:
    terminal = Terminal(port, "model=escaping")
    terminal.see("> ")
    terminal.type("x\n")
    shown = terminal.see("\n> ")
    assert "a\\x1b]52;c;eA==\\x07b\n人\t\\x9b1mc" in shown
    assert terminal.end("\x04") == 0
    # A program that reads the answer gets it as it is.
    assert pipe(port, "x", "model=escaping")[1] == "a\x1b]52;c;eA==\x07b\n人\t\x9b1mc\n"

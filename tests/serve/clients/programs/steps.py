"""Runs the steps of a client's program against an endpoint, and prints what each has got.

    export ENDPOINT_KEY=sk-...
    python ask_openai.py --url http://127.0.0.1:8000/v1 --model smollm2 [STEP ...]

A step is a function of the endpoint that returns what to print. Those whose names begin with
`error` expect one. Exit status 1: a step has failed; its traceback is printed. The programs run in
environments of their own: this module imports the standard library only.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn, TypeVar

STEP_SECONDS = 300
SHOWN_CHARACTERS = 120

QUESTION = "Which city shall I visit, and for how long?"


@dataclass(frozen=True)
class Endpoint:
    """What a client has to know of an endpoint."""

    url: str
    """Base URL, which ends with `/v1`."""

    model: str
    key: str
    model_dir: str
    """The served model's directory; empty: not known."""


Step = Callable[[Endpoint], object]
E = TypeVar("E", bound=Exception)


def run(*steps: Step) -> NoReturn:
    """Run steps, or those that the command line names, and exit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-dir", default="")
    parser.add_argument("--without-errors", action="store_true")
    parser.add_argument("names", nargs="*", choices=[[], *(step.__name__ for step in steps)])
    given = parser.parse_args()
    endpoint = Endpoint(given.url, given.model, os.environ["ENDPOINT_KEY"], given.model_dir)
    chosen = [
        step
        for step in steps
        if (step.__name__ in given.names or not given.names)
        and not (given.without_errors and step.__name__.startswith("error"))
    ]
    num_failed = sum(_run_step(step, endpoint) for step in chosen)
    sys.exit(int(num_failed > 0))


def _run_step(step: Step, endpoint: Endpoint) -> bool:
    """Run a step and print what it returns; return whether it failed."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(step, endpoint)
        error = future.exception(STEP_SECONDS)
    if error is None:
        shown = json.dumps(future.result(), ensure_ascii=False, default=str)
        sys.stdout.write(f"ok {step.__name__}: {shown[:SHOWN_CHARACTERS]}\n")
        return False
    sys.stdout.write(f"failed {step.__name__}\n")
    traceback.print_exception(error, file=sys.stdout)
    return True


def error_of(ask: Callable[[], object], kind: type[E]) -> E:
    """Return the error of this class that a request is answered with."""
    try:
        answer = ask()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}, but {answer}")


def provoke(ask: Callable[[], object], kind: type[E], *, num_clients: int = 32) -> E:
    """Send a request from many threads at a time; return an error of this class that one got."""
    with ThreadPoolExecutor(num_clients) as threads:
        futures = [threads.submit(ask) for _ in range(num_clients)]
        errors = [future.exception() for future in futures]
    found = [error for error in errors if isinstance(error, kind)]
    others = {repr(error) for error in errors if error is not None and error not in found}
    assert found, f"no {kind.__name__} among {num_clients} requests; errors: {others or 'none'}"
    assert not others, f"other errors: {others}"
    return found[0]


def joined(parts: Sequence[str | None]) -> str:
    """Return the text of a stream, which has come in several parts."""
    assert len(parts) > 1, f"not streamed: {parts}"
    return "".join(part or "" for part in parts)

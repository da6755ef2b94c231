"""Many clients in threads that send requests to an endpoint, and what became of them."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import openai


@dataclass
class Clients:
    """Send requests one after the other until the block ends.

    with Clients(url, {"model": "tiny", ...}, num_clients=8).asking() as clients:
        ...
    assert not clients.failures
    """

    url: str
    asked: Mapping[str, object]
    num_clients: int = 8
    num_requests: int | None = None
    """Number of requests of each client; None: until the block ends."""

    retry_seconds: float | None = None
    """How long a client waits before it asks once more what has failed; None: it does not."""

    texts: Counter[str] = field(default_factory=Counter)
    """Answers that came, by text."""

    num_retried: int = 0
    """Requests that were asked once more."""

    failures: list[Exception] = field(default_factory=list)
    """Of requests that were not answered."""

    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def asking(self) -> Iterator[Self]:
        """Ask until the block ends."""
        threads = [threading.Thread(target=self._run) for _ in range(self.num_clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    @property
    def num_answers(self) -> int:
        """How many came."""
        return sum(self.texts.values())

    def _run(self) -> None:
        client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120
        )
        numbers = itertools.count() if self.num_requests is None else range(self.num_requests)
        for _ in numbers:
            if self._over.is_set():
                break
            error = self._ask(client)
            if error is not None and self.retry_seconds is not None:
                self.num_retried += 1
                time.sleep(self.retry_seconds)
                error = self._ask(client)
            if error is not None:
                self.failures.append(error)
            if isinstance(error, openai.RateLimitError):
                # As clients do: else they leave no time to those who answer on the same cores.
                time.sleep(float(error.response.headers["Retry-After"]))

    def _ask(self, client: openai.OpenAI) -> Exception | None:
        asked: Any = self.asked
        try:
            told = client.completions.create(**asked)
        except openai.APIError as error:
            return error
        self.texts[told.choices[0].text] += 1
        return None


def wait_until(is_so: Callable[[], bool], *, seconds: float, what: str) -> float:
    """Return after how many seconds something is so; fail where it does not become so."""
    start = time.monotonic()
    while not is_so():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return time.monotonic() - start

"""A front of the S3 server that answers chosen requests with an error, and remembers all."""

import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from werkzeug.serving import make_server

from raytune_llama.storage.place import Place

Fault = Callable[[str, int], HTTPStatus | None]
"""From a request, `PUT /bucket/key?partNumber=1`, and how often it came before, to the error that
answers it, or None to let it through."""


def let_through(request: str, times: int) -> HTTPStatus | None:  # a Fault
    """The fault of a server that has none."""
    return None


class FaultyServer:
    """Serves the same buckets as the tests' server, in whose process it runs."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.fault: Fault = let_through
        self.requests: list[str] = []
        self._inner = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        # It looks for its end that often.
        poll = {"poll_interval": 0.02}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=poll, daemon=True)
        self._thread.start()

    def front_of(self, place: Place) -> Place:
        """Return a place as it is reached through this server."""
        options = f"endpoint_override=127.0.0.1:{self._server.server_port}&scheme=http"
        return Place(place.scheme, place.key, options)

    def close(self) -> None:
        """End."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        query = environ["QUERY_STRING"]
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}" + (query and f"?{query}")
        times = self.requests.count(request)
        # Before the fault: one that kills the client lets the test go on at once, and it counts.
        self.requests.append(request)
        status = self.fault(request, times)
        if status is None:
            return self._inner(environ, start)
        # What was sent has to be read, or the client sees a broken connection instead.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(f"{status.value} {status.phrase}", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{status.phrase.replace(' ', '')}</Code></Error>".encode()]

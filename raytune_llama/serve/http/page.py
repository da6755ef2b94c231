"""The chat page at `/`: one file without any other, and a policy that lets nothing else run.

The page itself holds no secret and needs no key; whatever it asks the API does.
"""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

_FILE = Path(__file__).with_name("chat.html")


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`."""
    html = _FILE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_policy(html),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """Send the page."""
        return HTMLResponse(html, headers=headers)


def content_policy(html: str) -> str:
    """Return the policy under which a page runs its own script and style, known by their hashes.

    It talks to the server that it came from and to nobody else, and a browser that knows trusted
    types refuses to take any text for HTML.
    """
    allowed = {
        "default-src": "'none'",
        "script-src": _hash_of(html, "script"),
        "style-src": _hash_of(html, "style"),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def _hash_of(html: str, tag: str) -> str:
    """Return the source expression of a page's only inline element of a kind."""
    found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert len(found) == 1, tag
    digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
    return f"'sha256-{digest}'"

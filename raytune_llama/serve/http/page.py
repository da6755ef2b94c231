"""The chat page at `/`: sent as one file, under a policy that lets nothing else run.

The page itself holds no secret and needs no key; whatever it asks the API does.
"""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

_HERE = Path(__file__).parent


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`."""
    html = join_page(_HERE)
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


def join_page(folder: Path) -> str:
    """Return the page of a folder with its style and script within it."""
    html, css, js = (
        (folder / f"chat.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    for tag, text in (("style", css), ("script", js)):
        html = html.replace(f"<{tag}></{tag}>", f"<{tag}>\n{text}</{tag}>")
    return html


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

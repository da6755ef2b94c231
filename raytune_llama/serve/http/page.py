"""The chat page at `/`: a single file, with a content security policy that runs nothing else.

The page itself contains no secret and needs no API key; its API requests do.
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
        """Return the chat page."""
        return HTMLResponse(html, headers=headers)


def join_page(folder: Path) -> str:
    """Return a folder's chat page with its style and script inlined."""
    html, css, js = (
        (folder / f"chat.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    for tag, text in (("style", css), ("script", js)):
        html = html.replace(f"<{tag}></{tag}>", f"<{tag}>\n{text}</{tag}>")
    return html


def content_policy(html: str) -> str:
    """Return a content security policy that allows only the page's own script and style, by hash.

    The page may connect only to its own server, and browsers that support Trusted Types refuse to
    parse any string as HTML.
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
    """Return the CSP source expression of a page's only inline element with a tag."""
    found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert len(found) == 1, tag
    digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
    return f"'sha256-{digest}'"

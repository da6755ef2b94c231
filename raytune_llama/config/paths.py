"""Names of what configured paths lead to."""

import re
from pathlib import Path


def path_name(text: str) -> str:
    """Return the last part of a path or URI, without a revision on the hub and a bucket's options.

    Args:
        text: Local path, `s3://bucket/key?options` or `hf://org/name@revision`.
    """
    path = re.sub(r"\?.*|@[^/]*", "", text) if "://" in text else text
    return Path(path).name

"""Connect to object storage and upload objects: URI options, retries, credentials.

Credentials come only from the vendor's own chain: the environment, its credentials file, or the
machine's role; for the Hugging Face Hub, from which datasets are only read, from HF_TOKEN.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Literal
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.fs as pafs

REMOTE_OPTIONS = {
    "s3": {"endpoint_override", "scheme", "region"},
    "gs": {"endpoint_override", "scheme"},
}
"""Supported schemes, and the query options of their URIs."""

HUB_TOKEN_ENVIRONMENT = "HF_TOKEN"  # noqa: S105  # its name
"""Environment variable with the token of the Hugging Face Hub, on every node that reads from it."""

NUM_ATTEMPTS = 8
"""Number of attempts per S3 request, with backoff: it fails after about a minute."""

RETRY_LIMIT_SECONDS = 60
"""Time limit for retries of a request to Google Cloud Storage; the library's is 15 minutes."""

NUM_CONNECTIONS = 8
"""Number of files of a folder transferred in parallel."""

UPLOAD_PART_BYTES = 64 * 2**20
"""Bytes of a file in flight at once, in parts of 10 MiB."""

_CONNECT_SECONDS = 10


@functools.lru_cache(maxsize=64)
def connect(scheme: str, bucket: str, options: str) -> pafs.FileSystem:
    """Return the file system of a bucket, without a request to the bucket itself.

    Args:
        scheme: `s3`, `gs`, `hf` for datasets on the hub, or empty for the local disk.
        bucket: Name of the bucket; empty for the local disk.
        options: Query string of the URI.

    Raises:
        OSError: The vendor does not report the bucket's region.
    """
    if not scheme:
        return pafs.LocalFileSystem()
    if scheme == "hf":
        return _connect_hub()
    given = dict(parse_qsl(options))
    if scheme == "gs":
        return pafs.GcsFileSystem(**given, retry_time_limit=timedelta(seconds=RETRY_LIMIT_SECONDS))
    query = f"?{options}" if options else ""
    # This requests the bucket's region from the vendor if neither it nor an endpoint is given.
    filesystem, _ = pafs.FileSystem.from_uri(f"{scheme}://{bucket}{query}")
    assert isinstance(filesystem, pafs.S3FileSystem)
    return pafs.S3FileSystem(
        region=filesystem.region,
        endpoint_override=given.get("endpoint_override"),
        scheme=given.get("scheme", "https"),
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=NUM_ATTEMPTS),
        connect_timeout=_CONNECT_SECONDS,
        # Both control what a failed upload leaves: with background_writes=False, a file of the
        # parts that succeeded; with allow_delayed_open=True, an empty file.
        background_writes=True,
        allow_delayed_open=False,
    )


def _connect_hub() -> pafs.FileSystem:
    """Return the hub as a file system; reading a range of a file requests no more than that."""
    from huggingface_hub import HfFileSystem

    return pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem(token=hub_token())))


def hub_token() -> str | Literal[False]:
    """Return the hub's token of the environment; False: none, even if one is stored on the disk."""
    return os.environ.get(HUB_TOKEN_ENVIRONMENT) or False


def write_object(filesystem: pafs.FileSystem, key: str, data: pa.Buffer) -> None:
    """Upload a file from memory or from a memory-mapped file; it appears complete or not at all."""

    def write() -> None:
        with filesystem.open_output_stream(key) as file:
            for start in range(0, data.size, UPLOAD_PART_BYTES):
                file.write(data[start : start + UPLOAD_PART_BYTES])
                # Bounds the bytes in flight; a failed part raises here, and no file appears.
                file.flush()

    # Closing a stream publishes what it has so far, so nothing may interrupt the upload: signals
    # raise only in the main thread, which waits here until the file is complete.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(write).result()

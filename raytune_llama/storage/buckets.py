"""How a bucket of object storage is reached and written: URI options, retries, credentials.

Credentials come from the vendor's own chain alone: the environment, its credentials file, or the
machine's role.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.fs as pafs

REMOTE_OPTIONS = {
    "s3": {"endpoint_override", "scheme", "region"},
    "gs": {"endpoint_override", "scheme"},
}
"""Known schemes, and what may stand behind `?` in their URIs."""

NUM_ATTEMPTS = 8
"""Of a request to S3, with growing pauses: it fails after about a minute."""

RETRY_LIMIT_SECONDS = 60
"""How long a request to Google's storage is made again; the library's own limit is 15 minutes."""

NUM_CONNECTIONS = 8
"""Files of a folder that are on their way at once."""

UPLOAD_PART_BYTES = 64 * 2**20
"""Of a file that are on their way at once, in parts of 10 MiB."""

_CONNECT_SECONDS = 10


@functools.lru_cache(maxsize=64)
def connect(scheme: str, bucket: str, options: str) -> pafs.FileSystem:
    """Return the file system of a bucket; nothing is asked of it yet.

    Args:
        scheme: `s3`, `gs`, or empty for the local disk.
        bucket: Its name; empty for the local disk.
        options: What stands behind `?` in the URI.

    Raises:
        OSError: The vendor does not say in which region the bucket is.
    """
    if not scheme:
        return pafs.LocalFileSystem()
    given = dict(parse_qsl(options))
    if scheme == "gs":
        return pafs.GcsFileSystem(**given, retry_time_limit=timedelta(seconds=RETRY_LIMIT_SECONDS))
    query = f"?{options}" if options else ""
    # This asks the vendor for the bucket's region where neither it nor an endpoint is given.
    filesystem, _ = pafs.FileSystem.from_uri(f"{scheme}://{bucket}{query}")
    assert isinstance(filesystem, pafs.S3FileSystem)
    return pafs.S3FileSystem(
        region=filesystem.region,
        endpoint_override=given.get("endpoint_override"),
        scheme=given.get("scheme", "https"),
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=NUM_ATTEMPTS),
        connect_timeout=_CONNECT_SECONDS,
        # Both decide what is left of an upload that fails: with the other value of the first, the
        # parts that did not fail become the file; of the second, nothing becomes an empty file.
        background_writes=True,
        allow_delayed_open=False,
    )


def write_object(filesystem: pafs.FileSystem, key: str, data: pa.Buffer) -> None:
    """Upload a file from memory, or from a map of a local file; it appears whole or not at all."""

    def write() -> None:
        with filesystem.open_output_stream(key) as file:
            for start in range(0, data.size, UPLOAD_PART_BYTES):
                file.write(data[start : start + UPLOAD_PART_BYTES])
                # Bounds what is on its way; a failed part shows here, and nothing appears.
                file.flush()

    # A stream shows what it has so far when it is closed, so nothing may interrupt it: signals
    # raise in the main thread alone, which waits here until the file is whole.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(write).result()

"""Recognize files beside the data that hold none: documentation, metadata, leftovers of tools.

They are skipped only in folders and globs; a file that a path names is always read. What is not
known here may be data, so a file with an unknown suffix stays an error.
"""

import json
import re
from fnmatch import fnmatch
from pathlib import PurePosixPath

from raytune_llama.storage.place import FileStatus, Place

_LEFTOVERS = (
    # of systems and editors
    *("thumbs.db", "desktop.ini", ".ds_store", "*~", "*.bak", "*.orig", "*.swp", "*.lock"),
    *(".gitattributes", ".gitignore", ".gitkeep"),
    # of downloads
    *("*.md5", "*.sha1", "*.sha256", "*.sha512", "*.crc", "md5sums", "sha256sums"),
    # of Spark and Databricks
    *("_success", "_metadata", "_common_metadata", "_committed_*", "_started_*"),
)
_DOCUMENT_SUFFIXES = ("", ".rst", ".html", ".pdf", ".cff", ".bib")
_DOCUMENTS = re.compile(
    r"(?:readme|licen[sc]e|copying|notice|authors|citation|changelog|contributing)(?:[-_.].*)?"
)
_TEXT_DOCUMENTS = re.compile(r"(?:readme|licen[sc]e|copying|notice)\.txt")

_METADATA_NAMES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_METADATA_KEYS = (
    # of Hugging Face's `datasets`
    *("features", "splits", "download_size", "dataset_size", "_data_files", "_fingerprint"),
    # of LLaMA-Factory's list of data sets
    *("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"),
)
_MAX_METADATA_BYTES = 32 << 20


def is_side_file(place: Place, status: FileStatus, declared: str) -> bool:
    """Whether a file in a folder or glob is known to hold no data.

    Args:
        place: Location of the file.
        status: Size of the file.
        declared: Format of the source in the config. If it is `txt`, documentation is data.
    """
    name = place.name.lower()
    if any(fnmatch(name, pattern) for pattern in _LEFTOVERS):
        return True
    if declared != "txt" and _is_document(name):
        return True
    return name in _METADATA_NAMES and _is_metadata(place, status)


def _is_document(name: str) -> bool:
    path = PurePosixPath(name)
    if path.suffix == ".md" or _TEXT_DOCUMENTS.fullmatch(name):
        return True
    return path.suffix in _DOCUMENT_SUFFIXES and _DOCUMENTS.fullmatch(path.stem) is not None


def _is_metadata(place: Place, status: FileStatus) -> bool:
    """Whether a JSON file is one object with keys of metadata; a file of rows never is."""
    if status.num_bytes > _MAX_METADATA_BYTES:
        return False
    try:
        value = json.loads(place.read_bytes())
    except (ValueError, RecursionError, OSError):
        return False  # inspecting it as data reports why it cannot be read
    if not isinstance(value, dict):
        return False
    parts = [value, *[one for one in value.values() if isinstance(one, dict)]]
    return any(key in part for part in parts for key in _METADATA_KEYS)

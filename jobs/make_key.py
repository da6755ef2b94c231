"""Make an API key: `python jobs/make_key.py FILE [NAME]`; the file gets its hash, you the key."""

import argparse
from pathlib import Path

from raytune_llama.config.settings import run_job
from raytune_llama.serve.http.keys import append_hash, make_key


def main() -> None:
    """Make a key, append its hash to the file, and print the key, once and for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="hashes of the keys that are let in (`keys_file`)")
    parser.add_argument("name", nargs="?", default="", help="whose key it is; a remark in the file")
    given = parser.parse_args()
    key, line = make_key()
    append_hash(given.file, line, given.name)
    print(f"{key}\nits hash is in {given.file}; the key itself is nowhere: keep it")


if __name__ == "__main__":
    run_job(main, ValueError)

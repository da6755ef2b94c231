"""Chat with a model behind any OpenAI endpoint: `python jobs/chat.py url=http://127.0.0.1:8000/v1`.

The key is read from the environment variable OPENAI_API_KEY. A question from a pipe is answered
once: `echo question | python jobs/chat.py model=NAME`.     --help lists every field
"""

import os
import sys

from raytune_llama.config.settings import load, run_job
from raytune_llama.serve.client.terminal import TerminalConfig, run_chat


def main() -> int:
    """Chat; return the exit status."""
    config = load(TerminalConfig, sys.argv[1:])
    key = os.environ.get("OPENAI_API_KEY") or None
    try:
        return run_chat(config, key, sys.stdin, sys.stdout, sys.stderr)
    except BrokenPipeError:
        # Whoever read the answer has gone, as `head` does; nor could what is left be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    run_job(main)

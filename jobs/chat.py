"""Chat in the terminal with any OpenAI endpoint, as `raytune chat`.

python jobs/chat.py url=URL [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("chat")

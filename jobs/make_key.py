"""Make an API key, as `raytune make-key`.

python jobs/make_key.py FILE [NAME]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("make-key")

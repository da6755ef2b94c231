"""Merge adapters into a base, as `raytune merge`.

python jobs/merge.py base=DIR adapters=[DIR, ...] target=DIR
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("merge")

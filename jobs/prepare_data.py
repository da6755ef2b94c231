"""Build a token store from text, as `raytune prepare-data`.

python jobs/prepare_data.py [CONFIG.yaml] [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("prepare-data")

"""Make instruction data with any OpenAI endpoint, as `raytune make-data`.

python jobs/make_data.py [CONFIG.yaml] [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("make-data")

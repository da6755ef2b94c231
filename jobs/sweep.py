"""Search for the best settings of a training run, as `raytune sweep`.

python jobs/sweep.py [SWEEP.yaml] [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("sweep")

"""Tune a causal LM on conversations, as `raytune sft`.

python jobs/sft.py [CONFIG.yaml] [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("sft")

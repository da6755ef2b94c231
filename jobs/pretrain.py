"""Continue the pre-training of a causal LM on plain text, as `raytune pretrain`.

python jobs/pretrain.py [CONFIG.yaml] [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("pretrain")

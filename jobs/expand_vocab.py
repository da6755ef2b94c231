"""Grow a tokenizer and its model, as `raytune expand-vocab`.

python jobs/expand_vocab.py [CONFIG.yaml] [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("expand-vocab")

"""Evaluate models side by side, as `raytune evaluate`.

python jobs/evaluate.py [CONFIG.yaml] [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("evaluate")

"""Answer a file of prompts, or chat with a model, as `raytune generate`.

python jobs/generate.py [CONFIG.yaml] [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("generate")

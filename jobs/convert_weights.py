"""Convert LLaMA weights, as `raytune convert-weights`.

python jobs/convert_weights.py source=DIR target=DIR [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("convert-weights")

"""Convert conversations, as `raytune convert-data`.

python jobs/convert_data.py 'sources=[{path: F}]' target=DIR [a.b=c ...]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("convert-data")

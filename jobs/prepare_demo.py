"""Make the demo material, as `raytune demo`.

python jobs/prepare_demo.py [TARGET=demo]
"""

from raytune_llama.cli import run

if __name__ == "__main__":
    run("demo")

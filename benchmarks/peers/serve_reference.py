"""transformers' `generate`, serial and as one static batch: the reference of serve_vs_peers.py.

    python benchmarks/peers/serve_reference.py SETTINGS.json

Prints seconds and new ids of each way as JSON. Threads are what OMP_NUM_THREADS says.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.serve_material import generate, load_reference


def main() -> None:
    """Run both ways; every length is warmed up by a short answer first."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    prompts, num_new = settings["prompts"], settings["num_new"]
    model = load_reference(Path(settings["model"]))
    generate(model, prompts, 2)
    generate(model, prompts[:1], 2)
    started = time.perf_counter()
    serial = [generate(model, [prompt], num_new)[0] for prompt in prompts]
    between = time.perf_counter()
    static = generate(model, prompts, num_new)
    ended = time.perf_counter()
    print(
        json.dumps(
            {
                "serial": {"seconds": between - started, "ids": serial},
                "static": {"seconds": ended - between, "ids": static},
            }
        )
    )


if __name__ == "__main__":
    main()

"""Our training loop as torchrun starts it, without Ray: `torchrun_loop.py CONFIG.json`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from raytune_llama.config.settings import from_dict
from raytune_llama.train.config import PretrainConfig, SftConfig
from raytune_llama.train.loop import train
from raytune_llama.train.process_group import ProcessGroup


def main() -> None:
    """Run the loop to its end as one of the processes."""
    fields = json.loads(Path(sys.argv[1]).read_text())
    kind = SftConfig if "chat" in fields["data"] else PretrainConfig
    config = from_dict(kind, fields)
    torch.set_num_threads(config.scale.cpus_per_worker)
    dist.init_process_group("gloo")
    train(config, ProcessGroup.from_torch(torch.device("cpu")), lambda: False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

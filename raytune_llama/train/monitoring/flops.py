"""What training asks of the hardware, and what the hardware could do."""

import torch
from transformers import PreTrainedModel

from raytune_llama.model.embeddings import is_new_rows
from raytune_llama.model.quantization import unquantized_shape

PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "V100-PCIE": 112e12,
    "V100": 125e12,
}
"""Dense half-precision FLOP/s by a part of the CUDA device's name, from NVIDIA's data sheets; the
first part that fits counts."""


def flops_per_token(model: PreTrainedModel, sequence_tokens: int) -> float:
    """Count the floating-point operations of training on one token.

    A matrix counts 4 a weight where it is frozen (forward, and the gradient of the activations)
    and 6 where it is trained, so LoRA comes to about 4N and full training to 6N. An input
    embedding of its own is a look-up and counts nothing. Causal attention adds 6 x layers x
    hidden x tokens. Recomputed activations are not counted: these are the model's FLOPs, as in
    PaLM (arXiv:2204.02311, appendix B).

    Args:
        model: read for shapes only, so its weights may be partitioned.
        sequence_tokens: tokens of a sequence.
    """
    config = model.config
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    is_look_up = head is None or head.weight is not embedding.weight
    tables = {id(weight) for weight in embedding.parameters()} if is_look_up else set[int]()
    total = 6.0 * config.num_hidden_layers * config.hidden_size * sequence_tokens
    for name, weight in model.named_parameters():
        shape = unquantized_shape(weight)
        # PEFT keeps a frozen copy of saved modules.
        if len(shape) < 2 or id(weight) in tables or ".original_module." in name:
            continue
        if is_new_rows(name):
            # They stand in the frozen table too, which has been counted.
            total += 2 * shape.numel()
        else:
            total += (6 if weight.requires_grad else 4) * shape.numel()
    return total


def peak_flops(device: torch.device) -> float | None:
    """Return what the device can do in half precision, in FLOP/s, or None where not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Return this worker's peak memory: the GPU's allocator, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""FLOPs of training per token, and peak FLOP/s and memory of the device."""

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
"""Dense half-precision FLOP/s by a substring of the CUDA device's name, from NVIDIA's data sheets;
the first match counts."""


def flops_per_token(model: PreTrainedModel, sequence_tokens: int) -> float:
    """Return the floating-point operations of training per token.

    A matrix counts 4 per weight if frozen (forward, and the gradient of the activations) and 6 if
    trained, so LoRA comes to about 4N and full training to 6N. An untied input embedding is a
    look-up and counts nothing. Causal attention adds 6 x layers x hidden x tokens. Recomputed
    activations are not counted: these are the model's FLOPs, as in PaLM (arXiv:2204.02311,
    appendix B).

    Args:
        model: read for shapes only, so its weights may be partitioned.
        sequence_tokens: tokens per sequence.
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
            # The frozen table, which has been counted, includes these rows.
            total += 2 * shape.numel()
        else:
            total += (6 if weight.requires_grad else 4) * shape.numel()
    return total


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak half-precision FLOP/s, or None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Return this worker's peak memory in GiB: of the GPU's allocator, or of the CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

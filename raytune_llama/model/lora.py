"""LoRA adapters: check, attach and load them, and write them in PEFT's own format."""

import copy
import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.pissa import plain_lora_settings, to_plain_lora

logger = logging.getLogger(__name__)


ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_adapter_targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Return which module names of `config` do not fit `model`, and why; empty if all do."""
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    problems = [
        f"lora.targets: no linear layer of the model ends with {target!r}; "
        f"its linear layers end with {_last_parts(linear)}"
        for target in config.targets
        if not any(_ends_with(name, target) for name in linear)
    ]
    for saved in config.modules_to_save:
        # PEFT matches string suffixes, not name components: "norm" matches input_layernorm too.
        matched = [name for name in modules if saved and name.endswith(saved)]
        others = [name for name in matched if not _ends_with(name, saved)]
        if len(others) == len(matched):
            problems.append(
                f"lora.modules_to_save: no module of the model ends with {saved!r}; "
                f"its modules end with {_last_parts(name for name in modules if name)}"
            )
        elif others:
            problems.append(
                f"lora.modules_to_save: {saved!r} would also train {_last_parts(others)}; "
                "use a longer name, such as "
                f"{next(name for name in matched if name not in others)}"
            )
    both = sorted(set(config.targets) & set(config.modules_to_save))
    if both:
        problems.append(
            f"lora.modules_to_save: got {', '.join(both)}, also in lora.targets; "
            "either adapt a module or train it fully"
        )
    head = next((name for name in linear if modules[name] is model.get_output_embeddings()), None)
    if head and any(_ends_with(head, target) for target in config.targets):
        problems.append(
            f"lora.targets: {head} cannot be adapted, since the loss reads its full weight; "
            "name it in lora.modules_to_save to train it"
        )
    if config.init == "pissa":
        problems += _check_rank(model, config)
    return problems


def _check_rank(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Return the first adapted weight that has fewer singular values than the rank."""
    for name, module in model.named_modules():
        is_target = any(_ends_with(name, target) for target in config.targets)
        if is_target and isinstance(module, nn.Linear) and config.rank > min(module.weight.shape):
            return [
                f"lora.rank: got {config.rank}, but {name} has {min(module.weight.shape)} singular "
                "values, of which init=pissa needs one per rank; use a smaller rank"
            ]
    return []


def _last_parts(names: Iterable[str]) -> str:
    parts = {name.rpartition(".")[2] for name in names}
    return ", ".join(sorted(part for part in parts if not part.isdigit()))


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def attach_adapter(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """Add a new adapter, A drawn from `seed` alone and B zero, and freeze the base.

    Tied input and output embeddings stay one table, even if trained.

    Raises:
        ValueError: PEFT cannot keep the tables of this model tied.
    """
    was_tied = is_tied(model)
    settings_ = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # annotated int; only divided by
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        modules_to_save=_saved_names(model, config) or None,
        use_rslora=config.rslora,
        use_dora=config.dora,
        ensure_weight_tying=bool(config.modules_to_save) and was_tied,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT warns about the tying that is requested here.
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
        # The model is on the CPU; `torch.manual_seed` would set the devices' generators too.
        torch.default_generator.manual_seed(seed)
        attached = peft.get_peft_model(model, settings_)
    assert isinstance(attached, PeftModel)
    if was_tied and not is_tied(model):
        raise UserError(
            f"lora.modules_to_save: with {', '.join(config.modules_to_save)} PEFT would untie the "
            f"embeddings of {type(model).__name__}, which are tied in the base; remove it"
        )
    return attached


def _saved_names(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Return the `modules_to_save` to pass to PEFT, by names under which a tied table stays tied.

    PEFT copies a tied input embedding that is not called embed_tokens (Bloom's), unless it is named
    by its head.
    """
    if not is_tied(model):
        return list(config.modules_to_save)
    names = {id(module): name for name, module in model.named_modules()}
    embedding = names[id(model.get_input_embeddings())]
    head = names[id(model.get_output_embeddings())]
    if _ends_with(embedding, "embed_tokens"):
        return list(config.modules_to_save)
    saved = (head if _ends_with(embedding, name) else name for name in config.modules_to_save)
    return list(dict.fromkeys(saved))


def load_adapter(model: PreTrainedModel, path: Path) -> PeftModel:
    """Attach the adapter of a directory, trainable, with its own settings.

    Raises:
        ValueError: the directory holds no adapter, the adapter does not fit the model, or nothing
            in it is trainable.
    """
    problem = check_adapter_directory(path)
    problems = [problem] if problem else check_adapter_fits(model, path)
    if problems:
        raise UserError("\n".join(problems))
    attached = PeftModel.from_pretrained(model, str(path), is_trainable=True)
    if not any(parameter.requires_grad for parameter in attached.parameters()):
        raise UserError(f"adapter: {path} has no trainable parameter")
    return attached


def check_adapter_directory(path: Path) -> str | None:
    """Return why `path` is not an adapter directory, or None if it is one."""
    missing = [
        name for name in ("adapter_config.json", ADAPTER_WEIGHTS) if not (path / name).is_file()
    ]
    if missing:
        return f"adapter: {path} lacks {', '.join(missing)}; name a directory written by PEFT"
    return None


def check_adapter_fits(model: PreTrainedModel, path: Path, *, num_ids: int = 0) -> list[str]:
    """Return why the adapter of a directory does not fit `model`; empty if it does.

    Only the model's class and config and the header of the adapter's weights are read.

    Args:
        model: the base, with or without its weights; it is not modified.
        path: an adapter directory; see `check_adapter_directory`.
        num_ids: ids of the tokenizer, to which the base's embeddings will have been grown.
    """
    config = copy.deepcopy(model.config)
    config.vocab_size = max(config.vocab_size, num_ids)
    try:
        settings_ = peft.PeftConfig.from_pretrained(str(path))
        with torch.device("meta"):
            base = type(model)(config)
            was_tied = is_tied(base)
            attached = peft.get_peft_model(base, settings_)
        with safe_open(path / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        return [f"adapter: {path} cannot be attached to {config.name_or_path}: {error}"]
    assert isinstance(attached, PeftModel)
    if isinstance(base.get_output_embeddings(), BaseTunerLayer):
        return [f"adapter: {path} adapts the output projection, whose full weight the loss reads"]
    if was_tied and not is_tied(base):
        return [
            f"adapter: {path} unties the embeddings of {config.name_or_path}, which are tied in "
            "the base; merge it into the base first, and train on the result"
        ]
    state = peft.get_peft_model_state_dict(attached, save_embedding_layers=False)
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    differing = [key for key in sorted(wanted | stored) if wanted.get(key) != stored.get(key)]
    if not differing:
        return []
    key = differing[0]
    return [
        f"adapter: {path} does not fit the model {config.name_or_path}: {len(differing)} of "
        f"{len(wanted)} tensors differ, the first is {key}, {stored.get(key, 'missing')} in the "
        f"adapter and {wanted.get(key, 'missing')} for the model; name the base that it was "
        "trained on, and its tokenizer"
    ]


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output projection and the input embedding share one table."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def write_adapter(
    model: PeftModel,
    trained: Mapping[str, Tensor],
    directory: Path,
    *,
    initial: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Write `adapter_config.json` and `adapter_model.safetensors` for PEFT to load.

    Args:
        model: the trained model; only its structure is read, so its weights may be partitioned
            over workers.
        trained: every trainable parameter, unpartitioned, by its name in
            `model.named_parameters()`.
        directory: an existing directory.
        initial: with `init: pissa`, the initial A and B; see `model.pissa`.

    Returns:
        The L2 norm of each tensor written, by key.

    Raises:
        ValueError: a tensor is missing, empty or not finite, or PEFT would not save all of them.
    """
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in trained
    ]
    if missing:
        raise UserError(f"adapter: {len(missing)} trained tensors missing, such as {missing[0]}")
    by_parameter: dict[nn.Parameter, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in trained:
            by_parameter[parameter] = trained[name]
    aliases = model.named_parameters(remove_duplicate=False)
    state = {name: by_parameter[weight] for name, weight in aliases if weight in by_parameter}
    keyed = peft.get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    num_kept = len({id(tensor) for tensor in keyed.values()})
    if num_kept != len(trained):
        raise UserError(
            f"adapter: PEFT has keys for {num_kept} of {len(trained)} trained tensors; "
            "the adapter would be incomplete"
        )
    adapter_config = copy.copy(cast("peft.LoraConfig", model.peft_config["default"]))
    adapter_config.inference_mode = True
    if initial is not None:
        keyed = to_plain_lora(keyed, initial)
        for field, value in plain_lora_settings(adapter_config).items():
            setattr(adapter_config, field, value)
    norms: dict[str, float] = {}
    for key, tensor in keyed.items():
        norms[key] = float(tensor.float().norm())
        if tensor.numel() == 0 or not math.isfinite(norms[key]):
            raise UserError(f"adapter: {key} is empty or not finite (norm {norms[key]})")
    # PEFT reads a tied table under both names; safetensors rejects shared memory, hence clone.
    save_file({key: tensor.clone() for key, tensor in keyed.items()}, directory / ADAPTER_WEIGHTS)
    adapter_config.save_pretrained(str(directory))
    return norms

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
from peft.utils import TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.adapter_config import ADAPTER_CONFIG_FILE
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.pissa import plain_lora_settings, to_plain_lora
from raytune_llama.model.vocab import is_tied

logger = logging.getLogger(__name__)

_Shapes = Mapping[str, tuple[int, ...]]


ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""File of the weights of adapters that are written here."""


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


def load_adapter(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Attach an adapter, trainable, with its own settings.

    Args:
        model: the base, for which `check_trainable` has found nothing.
        adapter: an open adapter.

    Raises:
        ValueError: a tensor is not finite, or nothing in the adapter is trainable.
    """
    settings_ = read_peft_config(adapter)
    settings_.inference_mode = False
    attached = peft.get_peft_model(model, settings_)
    assert isinstance(attached, PeftModel)
    load_adapter_state(attached, adapter)
    if not any(parameter.requires_grad for parameter in attached.parameters()):
        raise UserError(f"adapter: {adapter.path} has no trainable parameter")
    return attached


def read_peft_config(adapter: Adapter) -> peft.LoraConfig:
    """Return PEFT's config of an adapter."""
    return cast("peft.LoraConfig", peft.PeftConfig.from_pretrained(str(adapter.path)))


def load_adapter_state(attached: PeftModel, adapter: Adapter) -> None:
    """Load every tensor of an adapter into a model that it is attached to.

    Raises:
        ValueError: a tensor is not finite.
        AssertionError: PEFT does not load one; `check_adapter_fits` refuses such adapters.
    """
    adapter.check_values()
    result = peft.set_peft_model_state_dict(attached, adapter.read_state())
    assert not result.unexpected_keys, result.unexpected_keys


def check_trainable(model: PreTrainedModel, adapter: Adapter, *, num_rows: int = 0) -> list[str]:
    """Return why a run cannot continue from an adapter; empty if it can.

    Args:
        model: see `check_adapter_fits`.
        adapter: an open adapter.
        num_rows: see `check_adapter_fits`.
    """
    problems, attached = _compare(model, adapter, num_rows)
    if attached is None or problems:
        return problems
    base = attached.get_base_model()
    assert isinstance(base, PreTrainedModel)
    if isinstance(base.get_output_embeddings(), BaseTunerLayer | TrainableTokensWrapper):
        return [
            f"adapter: {adapter.path} adapts the output projection, whose full weight the loss "
            "reads; merge it into the base first, and train on the result"
        ]
    if model.config.tie_word_embeddings and not is_tied(base):
        return [
            f"adapter: {adapter.path} unties the embeddings of {model.config.name_or_path}, which "
            "are tied in the base; merge it into the base first, and train on the result"
        ]
    extra = sorted(adapter.peft_shapes().keys() - _trained_shapes(attached).keys())
    if not extra:
        return []
    return [
        f"adapter: {adapter.file} holds {len(extra)} tensors that {ADAPTER_CONFIG_FILE} does not "
        f"train, such as {extra[0]}, and that the run would not save; merge it into the base "
        "first, and train on the result"
    ]


def check_adapter_fits(
    model: PreTrainedModel, adapter: Adapter, *, field: str = "adapter", num_rows: int = 0
) -> list[str]:
    """Return why an adapter does not fit `model`, or is incomplete; empty if it fits.

    Only the model's class and config and the header of the adapter's weights are read.

    Args:
        model: the base, with or without its weights; it is not modified.
        adapter: an open adapter.
        field: config field that names the adapter, for errors.
        num_rows: rows to which the base's embedding tables will have been grown.
    """
    problems, _ = _compare(model, adapter, num_rows)
    return [problem.replace("adapter:", f"{field}:", 1) for problem in problems]


def _compare(
    model: PreTrainedModel, adapter: Adapter, num_rows: int
) -> tuple[list[str], PeftModel | None]:
    """Compare an adapter's file with what its config promises for a base."""
    config = copy.deepcopy(model.config)
    config.vocab_size = max(config.vocab_size, num_rows)
    where, start = str(config.name_or_path), f"adapter: {adapter.path}"
    with torch.device("meta"):
        base = type(model)(config)
        weights = {
            name: tuple(weight.shape)
            for name, weight in base.named_parameters(remove_duplicate=False)
        }
        try:
            attached = peft.get_peft_model(base, read_peft_config(adapter))
        except (ValueError, TypeError, KeyError) as error:
            return [f"{start} cannot be attached to {where}: {error}"], None
    assert isinstance(attached, PeftModel)
    wanted = _trained_shapes(attached)
    problem = (
        _find_unsupported_layer(attached)
        or _find_unknown_weight(adapter, weights, where)
        or _find_missing_tensor(adapter, wanted, where)
        or _find_other_shape(adapter, wanted, weights, where)
        or _find_unpromised_tensor(adapter, wanted)
    )
    return [] if problem is None else [f"{start} {problem}"], attached


def _find_unsupported_layer(attached: PeftModel) -> str | None:
    for name, module in attached.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            if not isinstance(layer, nn.Linear | nn.Embedding):
                return (
                    f"adapts {name.removeprefix('base_model.model.')}, a {type(layer).__name__}; "
                    "only linear layers and embeddings are supported"
                )
    return None


def _find_unknown_weight(adapter: Adapter, weights: _Shapes, where: str) -> str | None:
    unknown = sorted(adapter.weight_names - weights.keys())
    if not unknown:
        return None
    return (
        f"changes {len(unknown)} weights that {where} does not have, the first is {unknown[0]}; "
        "name the base that it was trained on"
    )


def _find_missing_tensor(adapter: Adapter, wanted: _Shapes, where: str) -> str | None:
    missing = sorted(wanted.keys() - adapter.peft_shapes().keys())
    if not missing:
        return None
    return (
        f"lacks {len(missing)} of the {len(wanted)} tensors that its config promises for {where}, "
        f"such as {missing[0]}: its file is incomplete, or that base has more layers than the one "
        "that it was trained on"
    )


def _find_other_shape(
    adapter: Adapter, wanted: _Shapes, weights: _Shapes, where: str
) -> str | None:
    stored = adapter.peft_shapes()
    found = {key: (stored[key], shape) for key, shape in wanted.items()}
    found |= {name: (adapter.spec(name).shape, weights[name]) for name in adapter.replaced}
    other = sorted(key for key, shapes in found.items() if shapes[0] != shapes[1])
    if not other:
        return None
    own, needed = found[other[0]]
    return (
        f"does not fit {where}: {len(other)} tensors have another shape, the first is {other[0]}, "
        f"{own} in the adapter and {needed} for the model; name the base that it was trained on, "
        "and its tokenizer"
    )


def _find_unpromised_tensor(adapter: Adapter, wanted: _Shapes) -> str | None:
    extra = sorted(adapter.peft_shapes().keys() - wanted.keys())
    extra = [key for key in extra if ".lora_" in key or ".token_adapter." in key]
    if not extra:
        return None
    return (
        f"holds {len(extra)} tensors that its {ADAPTER_CONFIG_FILE} does not promise, such as "
        f"{extra[0]}; the files are of different adapters"
    )


def _trained_shapes(attached: PeftModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that PEFT saves of a model, by key."""
    state = peft.get_peft_model_state_dict(attached, save_embedding_layers=False)
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


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

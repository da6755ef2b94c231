"""From an adapter directory to LoRA factors of the base's layers, or to a merged model.

PEFT defines what an adapter's files mean: it builds the adapter around a skeleton of the base
without weights, and the factors are read from there. Adapters that change more than linear layers
(fully trained embeddings, a grown vocabulary, DoRA, other RoPE settings) are merged into a copy,
or refused if the base's weights are with an engine of its own.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.adapter_lineage import check_chain
from raytune_llama.model.directory import stored_tables
from raytune_llama.model.embeddings import embedding_layers
from raytune_llama.model.lineage import CHAT_KEY
from raytune_llama.model.llama import check_not_quantized
from raytune_llama.model.lora import (
    check_adapter_fits,
    load_adapter_state,
    read_peft_config,
)
from raytune_llama.model.rope import apply_rope_settings, read_model_settings
from raytune_llama.model.tensors import open_weights
from raytune_llama.model.vocab import (
    describe_tokenizer_mismatch,
    has_tokenizer,
    is_tied,
    num_embedding_rows,
)
from raytune_llama.serve.config import ServedModelConfig
from raytune_llama.serve.engine.lora import LoraLayerWeights
from raytune_llama.serve.engine.vllm import VLLM_ADAPTER_RANK
from raytune_llama.serve.generation.model import (
    ServedModel,
    check_files,
    context_tokens,
    find_text_ids,
    load_chat_encoder,
)
from raytune_llama.storage.directories import fetched
from raytune_llama.storage.files import read_manifest
from raytune_llama.tokenizer.loader import load_tokenizer

logger = logging.getLogger(__name__)

_MERGED_TOLERANCE = 1e-3
"""Largest difference of the merged copy's logits from PEFT's, relative to the largest logit."""

_ONE_AT_A_TIME = threading.Lock()
"""Serializes loading: transformers and PEFT patch torch process-wide while they build a model."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter, checked and in memory."""

    served: ServedModel
    """Name, tokenizer, template and model: the base model, or a merged copy."""

    updates: Mapping[str, LoraLayerWeights] | None
    """LoRA factors by the name of the base's linear layer, on the base's device; None: merged into
    a copy."""


@contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """Raise what PEFT and transformers raise for incomplete files as a UserError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} can't be read as an adapter: {error}") from error


def _need_copy(adapter: Adapter, reason: str) -> UserError:
    return UserError(
        f"{adapter.path} changes more than linear layers, which vLLM does not support: {reason}; "
        "merge it into the base with `raytune merge` and serve the result, or set "
        "replicas.engine=transformers"
    )


class AdapterLoader:
    """Loads adapters for one base model, without touching the base model, which is in use."""

    def __init__(self, config: ServedModelConfig, base: ServedModel) -> None:
        """Prepare to load adapters.

        Args:
            config: config of the base model.
            base: the loaded base model. On the meta device, an engine of its own has its weights:
                adapters are not merged into a copy, and their factors are on the CPU.
        """
        self._config, self._base, self._path = config, base, fetched(config.path)
        self._num_rows = num_embedding_rows(base.model)
        self._dtype, self._device = base.model.dtype, base.model.device
        self._has_weights = self._device.type != "meta"
        self._max_rank = config.max_adapter_rank
        if self._max_rank is None and not self._has_weights:
            self._max_rank = VLLM_ADAPTER_RANK

    def load(self, folder: Path, name: str) -> LoadedAdapter:
        """Verify an adapter and load it; takes time in proportion to its size.

        Args:
            folder: local directory with the adapter's files.
            name: name of the model with the adapter in requests.

        Raises:
            ValueError: the adapter is damaged, made for another base, or can't be served.
            OSError: a file can't be read.
        """
        with _ONE_AT_A_TIME, _as_user_error(folder):
            return self._load(folder, name)

    def find_problem(self, folder: Path) -> str | None:
        """Return why an adapter can't be served, or None if its settings show no reason.

        Neither the values of its weights nor the hashes of its files are checked, which takes time.
        """
        try:
            with _as_user_error(folder):
                adapter = Adapter.open(folder, field="adapter")
                is_own = has_tokenizer(folder)
                tokenizer = load_tokenizer(folder) if is_own else self._base.tokenizer
                self._check(adapter, len(tokenizer), verify=False)
                if not self._has_weights:
                    self._refuse_other_changes(adapter, len(tokenizer))
        except OSError:
            return None  # being written or removed
        except ValueError as error:
            return str(error).replace(str(folder), folder.name)
        return None

    def describe(self, folder: Path, name: str) -> ServedModel:
        """Return the model with an adapter's tokenizer and chat template, and the base's weights.

        Checks all of the adapter but the values of its weights, and whether the engine runs it.

        Args:
            folder: local directory with the adapter's files.
            name: name of the model with the adapter in requests.

        Raises:
            ValueError: the adapter is damaged or made for another base.
            OSError: a file can't be read.
        """
        with _as_user_error(folder):
            return self._describe(Adapter.open(folder, field="adapter"), name)

    def _describe(self, adapter: Adapter, name: str) -> ServedModel:
        folder, tokenizer = adapter.path, self._base.tokenizer
        is_own_tokenizer = has_tokenizer(folder)
        if is_own_tokenizer:
            tokenizer = load_tokenizer(folder)
        self._check(adapter, len(tokenizer), verify=self._config.verify)
        recorded = read_manifest(folder).get(CHAT_KEY)
        chat = self._base.chat
        if recorded or (is_own_tokenizer and chat is not None):
            chat = load_chat_encoder(
                tokenizer,
                folder,
                recorded,
                wanted=None if recorded or chat is None else chat.config.template,
                allow_other=self._config.allow_other_template,
            )
        begin = find_text_ids([self._path, folder], tokenizer)
        return replace(self._base, name=name, tokenizer=tokenizer, chat=chat, leading_ids=begin)

    def _load(self, folder: Path, name: str) -> LoadedAdapter:
        adapter = Adapter.open(folder, field="adapter")
        served = self._describe(adapter, name)
        tokenizer = served.tokenizer
        adapter.check_values()
        if not self._has_weights:
            self._refuse_other_changes(adapter, len(tokenizer))
        is_plain = len(tokenizer) == len(self._base.tokenizer) and not read_model_settings(folder)
        if is_plain and self._is_linear(adapter):
            return LoadedAdapter(served, self._read_updates(adapter))
        if not self._has_weights:
            raise _need_copy(adapter, "it replaces embedding tables")
        model = self._merge(adapter, len(tokenizer))
        limit = context_tokens(self._config, model)
        return LoadedAdapter(replace(served, model=model, max_context=limit), None)

    def _check(self, adapter: Adapter, num_ids: int, *, verify: bool) -> None:
        """Reject an adapter that is incomplete, too large, or was made for another base."""
        folder, model = adapter.path, self._base.model
        if self._max_rank is not None and adapter.max_rank > self._max_rank:
            raise UserError(
                f"{folder} has rank {adapter.max_rank}, and max_adapter_rank is {self._max_rank}; "
                "set models.N.max_adapter_rank"
            )
        problems = check_files(folder) if verify else []
        problems = problems or check_not_quantized(self._path, "base")
        if not problems:
            problems = check_chain(self._path, [adapter], base_field="base")
        if not problems:
            rows = num_ids if num_ids > self._num_rows else 0
            problems = check_adapter_fits(model, adapter, num_rows=rows)
        if problems:
            # Clients see it, and no path of this machine.
            text = "; ".join(problems).replace(str(self._path), self._base.name)
            raise UserError(text)
        if has_tokenizer(folder) and has_tokenizer(self._path):
            foreign = describe_tokenizer_mismatch(self._path, folder)
            if foreign:
                raise UserError(foreign)

    def _is_linear(self, adapter: Adapter) -> bool:
        """Whether an adapter only adds low-rank updates to linear layers of the base.

        PEFT may save embedding tables that were not trained: equal to the base's, they change
        nothing.
        """
        if not adapter.has_plain_updates:
            return False
        weights = self._read_tables() if adapter.replaced else {}
        return all(
            name in weights
            and torch.equal(adapter.read_replaced(name).to(weights[name]), weights[name])
            for name in adapter.replaced
        )

    def _read_tables(self) -> dict[str, Tensor]:
        """Return the base's weights, or only its embedding tables if they are read from disk."""
        model = self._base.model
        if self._has_weights:
            parameters = model.named_parameters(remove_duplicate=False)
            return {name: weight.detach() for name, weight in parameters}
        stored, weights = stored_tables(model, self._path), open_weights(self._path)
        tables = {name: weights.read(file) for file, name in stored.items()}
        if is_tied(model):
            (table,) = tables.values()
            return {f"{layer}.weight": table for layer in embedding_layers(model)}
        return tables

    def _refuse_other_changes(self, adapter: Adapter, num_ids: int) -> None:
        """Reject an adapter whose settings show that it changes more than linear layers."""
        if num_ids != len(self._base.tokenizer):
            raise _need_copy(adapter, f"its tokenizer has {num_ids} ids")
        if read_model_settings(adapter.path):
            raise _need_copy(adapter, "it changes settings of the model")
        if not adapter.has_plain_updates:
            raise _need_copy(adapter, "it uses DoRA or changes rows of embedding tables")
        tables = {f"{layer}.weight" for layer in embedding_layers(self._base.model)}
        if tables & set(adapter.low_rank):
            # See `AdapterLimits.layers`.
            raise _need_copy(adapter, "it updates an embedding table or the output head")

    def _read_updates(self, adapter: Adapter) -> dict[str, LoraLayerWeights]:
        """Return the LoRA factors of an adapter by the name of the base's layer."""
        updates: dict[str, LoraLayerWeights] = {}
        for name, update in adapter.low_rank.items():
            # PEFT computes in float32, whatever the base's dtype.
            b_OR, a_RI, _ = adapter.factors(name)
            scaled_RO = (b_OR.T * update.scale).contiguous()
            layer = name.removesuffix(".weight")
            if self._has_weights:
                a_RI, scaled_RO = a_RI.to(self._device), scaled_RO.to(self._device)
            updates[layer] = LoraLayerWeights(a_RI, scaled_RO)
        return updates

    def _merge(self, adapter: Adapter, num_ids: int) -> PreTrainedModel:
        """Return a copy of the base with the adapter merged in, computed in float32."""
        folder = adapter.path
        config = AutoConfig.from_pretrained(self._path, local_files_only=True)
        apply_rope_settings(config, read_model_settings(folder))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self._path,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
        ).eval()
        is_grown = num_ids > self._num_rows
        if is_grown:
            model.resize_token_embeddings(num_ids, mean_resizing=False)
        was_tied = is_tied(model)
        settings_ = read_peft_config(adapter)
        settings_.inference_mode = True
        attached = peft.get_peft_model(model, settings_).eval()
        assert isinstance(attached, PeftModel)
        load_adapter_state(attached, adapter)
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        kept = [isinstance(table, ModulesToSaveWrapper) for table in tables]
        if is_grown and not (all(kept) or (was_tied and any(kept))):
            raise UserError(
                f"{folder} has a tokenizer of {num_ids} ids and the base {self._num_rows} rows, "
                "but the adapter holds no embeddings for them"
            )
        ids_1T = torch.arange(min(num_ids, 16)).unsqueeze(0)
        with torch.inference_mode():
            wanted = attached(input_ids=ids_1T).logits
        merged = attached.merge_and_unload(safe_merge=True)
        assert isinstance(merged, PreTrainedModel)
        with torch.inference_mode():
            error = (merged(input_ids=ids_1T).logits - wanted).abs().max() / wanted.abs().max()
        if not error <= _MERGED_TOLERANCE:
            raise UserError(
                f"{folder} can't be merged into a copy of {self._base.name}: its logits have a "
                f"relative error of {float(error):.1e}; merge it with jobs/merge.py instead"
            )
        num_bytes = sum(p.numel() for p in merged.parameters()) * self._dtype.itemsize
        logger.warning(
            "%s changes more than linear layers: it needs a full copy of the base, %.2f GiB",
            folder,
            num_bytes / 2**30,
        )
        merged.requires_grad_(requires_grad=False)
        nn.Module.to(merged.eval(), device=self._device, dtype=self._dtype)
        return merged

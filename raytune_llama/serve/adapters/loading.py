"""From an adapter directory to LoRA factors of the base's layers, or to a merged model.

PEFT defines what an adapter's files mean: it builds the adapter around a skeleton of the base
without weights, and the factors are read from there. Adapters that change more than linear layers
(fully trained embeddings, a grown vocabulary, DoRA, other RoPE settings) are merged into a copy.
"""

import copy
import functools
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.model.lineage import CHAT_KEY, find_leading_ids
from raytune_llama.model.lora import ADAPTER_WEIGHTS, check_adapter_directory, is_tied
from raytune_llama.model.rope import apply_rope_settings, read_model_settings
from raytune_llama.model.vocab import describe_tokenizer_mismatch, has_tokenizer, num_embedding_rows
from raytune_llama.serve.config import ServedModelConfig
from raytune_llama.serve.engine.lora import LoraLayerWeights
from raytune_llama.serve.generation.model import (
    ServedModel,
    check_files,
    context_tokens,
    load_chat_encoder,
)
from raytune_llama.storage.files import read_manifest
from raytune_llama.storage.hashes import hash_file, show_hash
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
    """LoRA factors by the name of the base's linear layer; None: merged into a copy."""


class AdapterLoader:
    """Loads adapters for one base model, without touching the base model, which is in use."""

    def __init__(self, config: ServedModelConfig, base: ServedModel) -> None:
        """Prepare to load adapters.

        Args:
            config: config of the base model.
            base: the loaded base model.
        """
        self._config, self._base, self._path = config, base, Path(config.path)
        # Copied before any adapter is attached.
        self._settings = copy.deepcopy(base.model.config)
        self._num_rows = num_embedding_rows(base.model)
        self._dtype, self._device = base.model.dtype, base.model.device
        # Hashed once, since the base in memory was loaded from the files at startup.
        self._hash = functools.cache(hash_file)

    def load(self, folder: Path, name: str) -> LoadedAdapter:
        """Verify an adapter and load it; takes time in proportion to its size.

        Args:
            folder: local directory with the adapter's files.
            name: name of the model with the adapter in requests.

        Raises:
            ValueError: the adapter is damaged, made for another base, or can't be served.
            OSError: a file can't be read.
        """
        try:
            with _ONE_AT_A_TIME:
                return self._load(folder, name)
        except (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            # Raised by PEFT and transformers for incomplete files.
            raise UserError(f"{folder} can't be read as an adapter: {error}") from error

    def _load(self, folder: Path, name: str) -> LoadedAdapter:
        self._check(folder)
        tokenizer = self._base.tokenizer
        is_own_tokenizer = has_tokenizer(folder)
        if is_own_tokenizer:
            tokenizer = load_tokenizer(folder)
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
        begin = find_leading_ids([self._path, folder], tokenizer)
        served = replace(self._base, name=name, tokenizer=tokenizer, chat=chat, leading_ids=begin)
        settings_ = cast("peft.LoraConfig", peft.PeftConfig.from_pretrained(str(folder)))
        if settings_.peft_type != "LORA":
            raise UserError(f"{folder} has PEFT type {settings_.peft_type}, wanted LORA")
        settings_.inference_mode = True
        state = load_file(folder / ADAPTER_WEIGHTS)
        broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
        if broken or not state:
            problem = f"{broken[0]} has NaN or infinite values" if broken else "it has no tensors"
            raise UserError(f"{folder}: {problem}")
        is_plain = len(tokenizer) == len(self._base.tokenizer) and not read_model_settings(folder)
        updates = self._read_updates(settings_, state, folder) if is_plain else None
        if updates is not None:
            return LoadedAdapter(served, updates)
        model = self._merge(folder, settings_, state, len(tokenizer))
        limit = context_tokens(self._config, model)
        return LoadedAdapter(replace(served, model=model, max_context=limit), None)

    def _check(self, folder: Path) -> None:
        """Reject an adapter that is incomplete, or was made for another base."""
        problem = check_adapter_directory(folder)
        problems = [problem] if problem else []
        if not problems and self._config.verify:
            problems += check_files(folder)
        if problems:
            raise UserError("; ".join(problems))
        wanted = read_manifest(folder).get("base")
        if not wanted:
            logger.warning(
                "%s does not record its base model: only tensor shapes are checked", folder
            )
        for file, digest in sorted((wanted or {}).items()):
            path = self._path / Path(file).name
            found = self._hash(path, digest) if path.is_file() else None
            if found == digest:
                continue
            if path.suffix == ".json":
                # Its content may be equivalent; a merge does not compare it either.
                logger.warning("%s was made for a base with another %s", folder, file)
                continue
            raise UserError(
                f"{folder} was made for a base whose {file} has the hash {show_hash(digest)}, but "
                f"{self._base.name} has {show_hash(found) if found else 'no such file'}; serve "
                "it with its own base"
            )
        if has_tokenizer(folder) and has_tokenizer(self._path):
            foreign = describe_tokenizer_mismatch(self._path, folder)
            if foreign:
                raise UserError(foreign)

    def _read_updates(
        self, settings_: peft.LoraConfig, state: Mapping[str, Tensor], folder: Path
    ) -> dict[str, LoraLayerWeights] | None:
        """Return an adapter's LoRA factors, or None if it changes more than linear layers."""
        settings_ = copy.deepcopy(settings_)
        with torch.device("meta"):
            skeleton = type(self._base.model)(copy.deepcopy(self._settings))
            attached = PeftModel(skeleton, settings_)
        others = [
            module
            for module in attached.modules()
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
            and not (isinstance(module, PeftLinear) and _is_plain(module))
        ]
        if others:
            return None
        self._compare(folder, attached, state)
        updates: dict[str, LoraLayerWeights] = {}
        for name, module in attached.get_base_model().named_modules():
            if isinstance(module, PeftLinear):
                # PEFT computes in float32, whatever the base's dtype.
                a_RI = state[f"base_model.model.{name}.lora_A.weight"].float()
                b_RO = state[f"base_model.model.{name}.lora_B.weight"].float().T
                scaled_RO = (b_RO * module.scaling["default"]).contiguous()
                updates[name] = LoraLayerWeights(a_RI.to(self._device), scaled_RO.to(self._device))
        if not updates:
            raise UserError(f"{folder} adapts no layer of {self._base.name}")
        return updates

    def _compare(self, folder: Path, attached: PeftModel, state: Mapping[str, Tensor]) -> None:
        """Reject files with missing or unexpected tensors."""
        expected = peft.get_peft_model_state_dict(attached, save_embedding_layers=False)
        wanted = {key: tuple(tensor.shape) for key, tensor in expected.items()}
        # PEFT may save full embeddings that were not trained.
        stored = {
            key: tuple(tensor.shape)
            for key, tensor in state.items()
            if key in wanted or ".lora_" in key
        }
        odd = [key for key in sorted(wanted | stored) if wanted.get(key) != stored.get(key)]
        if odd:
            key = odd[0]
            raise UserError(
                f"{folder} does not fit {self._base.name}: {len(odd)} of {len(wanted)} tensors "
                f"differ, the first is {key}, {stored.get(key, 'missing')} in the adapter and "
                f"{wanted.get(key, 'missing')} for the model"
            )

    def _merge(
        self, folder: Path, settings_: peft.LoraConfig, state: Mapping[str, Tensor], num_ids: int
    ) -> PreTrainedModel:
        """Return a copy of the base with the adapter merged in, computed in float32."""
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
        attached = PeftModel.from_pretrained(model, str(folder), config=settings_).eval()
        self._compare(folder, attached, state)
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


def _is_plain(module: PeftLinear) -> bool:
    """Whether the adapter of a linear layer is a plain product of two factors."""
    return (
        isinstance(module.get_base_layer(), nn.Linear)
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and not module.fan_in_fan_out
    )

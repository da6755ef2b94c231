"""Export of a run: an adapter or a model directory, with a manifest of its provenance."""

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from torch import Tensor

import raytune_llama
from raytune_llama.chat.templates.choice import find_stop_ids
from raytune_llama.config.settings import to_dict
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.adapter_lineage import (
    LINEAGE_KEY,
    describe_training,
    fingerprint_model,
    hash_adapter,
)
from raytune_llama.model.directory import write_token_settings, write_with_trained_tables
from raytune_llama.model.lineage import (
    CHAT_KEY,
    TEXT_KEY,
    TOKENIZER_KEY,
    TRACKERS_KEY,
    find_text_start,
)
from raytune_llama.model.llama import DTYPES, causal_lm, model_settings
from raytune_llama.model.lora import write_adapter
from raytune_llama.model.rope import MODEL_SETTINGS_KEY
from raytune_llama.model.vocab import new_ids
from raytune_llama.storage.directories import fetched
from raytune_llama.storage.files import OUTPUT_MANIFEST, write_json_atomic
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import Place
from raytune_llama.storage.transfers import publish_place
from raytune_llama.tokenizer.loader import hash_tokenizer, load_tokenizer, write_tokenizer
from raytune_llama.train.checkpoint.initial_adapter import read_initial_factors
from raytune_llama.train.checkpoint.layout import RunState
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.engines.protocol import TrainEngine
from raytune_llama.train.monitoring.trackers.state import read_addresses
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.run_files import RUN_KEY
from raytune_llama.train.untrained_rows import UNTRAINED_ROWS, count_untrained_rows

logger = logging.getLogger(__name__)


def result_path(config: AnyTrainConfig) -> Place:
    """Return the directory that a finished run exports its result to."""
    return config.run_place / config.result_name


def read_result(config: AnyTrainConfig) -> dict[str, Any] | None:
    """Return the manifest of a finished run's result; None if it is not finished."""
    manifest = result_path(config) / OUTPUT_MANIFEST
    return manifest.read_json() if manifest.status() is not None else None


def write_result(
    config: AnyTrainConfig,
    store: TokenStore,
    engine: TrainEngine,
    state: RunState,
    workers: ProcessGroup,
    *,
    mixture: Mapping[str, Any],
    last: RunState | None = None,
) -> None:
    """Write the adapter or the model, its tokenizer and a manifest; collective.

    Trained tensors are written unsharded: in float32 for an adapter, in the run's precision after
    full training, and in the base model's dtype if only the embedding tables were trained.

    Args:
        config: config of the run.
        store: token store that it trained on.
        engine: holds the weights to write.
        state: state of the step whose weights they are.
        workers: all workers of the run.
        mixture: what those weights were trained on, by source name.
        last: state of the run's last step; None: `state`.
    """
    trained = {name: tensor for name, tensor in engine.full_weights() if workers.is_rank_zero}
    if not workers.is_rank_zero:
        return
    base, tokenizer = fetched(config.model.path), fetched(config.model.tokenizer_path)
    lm = causal_lm(engine.module.model)
    with publish_place(result_path(config), last=OUTPUT_MANIFEST) as folder:
        norms = _write_weights(config, engine, trained, folder)
        write_tokenizer(tokenizer, folder)
        if config.train != "lora":
            stop_ids = find_stop_ids(store.manifest.inputs.get(CHAT_KEY), tokenizer)
            write_token_settings(folder, load_tokenizer(tokenizer), stop_ids)
        manifest = {
            **_describe_result(config, store, state, last or state),
            "mixture": mixture,
            "num_trained": sum(tensor.numel() for tensor in trained.values()),
            "tensor_norms": norms,
            UNTRAINED_ROWS: count_untrained_rows(config, lm, len(new_ids(base, tokenizer))),
            "files": {path.name: hash_file(path) for path in sorted(folder.iterdir())},
        }
        write_json_atomic(folder / OUTPUT_MANIFEST, manifest)
    logger.info("%s written to %s", manifest["kind"], result_path(config))
    if manifest[MODEL_SETTINGS_KEY]:
        logger.warning(
            "the adapter was trained with settings that differ from its base's config.json (%s) "
            "and that PEFT's files cannot store: our merge writes them; with PEFT alone, load the "
            "base with them",
            ", ".join(manifest[MODEL_SETTINGS_KEY]),
        )


def _describe_result(
    config: AnyTrainConfig, store: TokenStore, state: RunState, last: RunState
) -> dict[str, Any]:
    """Return what a result's manifest says of its run and its inputs."""
    return {
        "format": 1,
        "kind": "adapter" if config.train == "lora" else "model",
        "raytune_llama": raytune_llama.__version__,
        "step": state.step,
        "tokens": state.tokens,
        RUN_KEY: _run_record(last),
        "base": fingerprint_model(fetched(config.model.path)),
        # Quantization of the base during training; merging uses the unquantized base.
        "base_quantization": config.model.quantization,
        MODEL_SETTINGS_KEY: model_settings(config.model) if config.train == "lora" else {},
        "adapter": fingerprint_adapter(config),
        LINEAGE_KEY: _lineage(config) if config.train == "lora" else None,
        TOKENIZER_KEY: hash_tokenizer(fetched(config.model.tokenizer_path)),
        "store": store.fingerprint,
        CHAT_KEY: store.manifest.inputs.get(CHAT_KEY),
        TEXT_KEY: _text_start(config, store),
        TRACKERS_KEY: read_addresses(config.run_place),
        "config": to_dict(config),
    }


def _lineage(config: AnyTrainConfig) -> dict[str, Any]:
    before = Adapter.open(fetched(config.adapter), field="adapter") if config.adapter else None
    return describe_training(fetched(config.model.path), before)


def _run_record(last: RunState) -> dict[str, Any]:
    """Return how a run went, whichever step is its result."""
    return {
        "last_step": last.step,
        "best_step": last.best_step,
        "best_loss": last.best_loss,
        "bad_steps": last.num_bad_steps,
        "skipped_steps": last.num_skipped_steps,
        "undone_steps": last.num_undone_steps,
    }


def _text_start(config: AnyTrainConfig, store: TokenStore) -> dict[str, Any] | None:
    """Return how the texts of the run, or of the training before it, began; None if unknown."""
    inputs = store.manifest.inputs
    if CHAT_KEY not in inputs and "tokenizer" in inputs:
        return {"bos_id": inputs["tokenizer"]["bos_id"]}
    before = [config.model.path, *([config.adapter] if config.adapter else [])]
    return find_text_start([fetched(path) for path in before])


def _write_weights(
    config: AnyTrainConfig, engine: TrainEngine, trained: Mapping[str, Tensor], folder: Path
) -> dict[str, float]:
    model = engine.module.model
    if isinstance(model, PeftModel):
        if config.lora is None or config.lora.init == "default":
            return write_adapter(model, trained, folder)
        with TemporaryDirectory() as copies:
            initial = read_initial_factors(config.run_place, Path(copies))
        return write_adapter(model, trained, folder, initial=initial)
    lm = causal_lm(model)
    if config.train == "embeddings":
        base, tokenizer = fetched(config.model.path), fetched(config.model.tokenizer_path)
        changed = model_settings(config.model)
        return write_with_trained_tables(lm, base, tokenizer, trained, folder, settings=changed)
    dtype = DTYPES[config.engine.precision]
    lm.save_pretrained(
        folder, state_dict={name: tensor.to(dtype) for name, tensor in trained.items()}
    )
    return {name: float(tensor.norm()) for name, tensor in trained.items()}


def fingerprint_adapter(
    config: AnyTrainConfig, like: Mapping[str, str] | None = None
) -> dict[str, str] | None:
    """Return the hash of each file of the adapter that a run continues from, or None.

    Args:
        config: config of the run.
        like: recorded fingerprint to compare with, whose algorithms to use; None: a new one.
    """
    if config.adapter is None:
        return None
    return hash_adapter(Adapter.open(fetched(config.adapter), field="adapter"), like)

"""Load a model to evaluate, and compute with it: log-likelihoods, answers and the loss of text."""

import asyncio
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.evaluate.config import EvaluatedModelConfig
from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.merger import merge_adapters
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.adapter_lineage import fingerprint_model, hash_adapter
from raytune_llama.model.embeddings import embedding_layers
from raytune_llama.model.lineage import find_chat_template
from raytune_llama.model.llama import SummedLoss
from raytune_llama.model.vocab import has_tokenizer
from raytune_llama.serve.adapters.loading import AdapterLoader, LoadedAdapter
from raytune_llama.serve.config import SamplingDefaults, ServedModelConfig
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.lora import LoraLayers
from raytune_llama.serve.engine.protocol import SamplingOptions
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.engine.scoring import Candidates, ContinuationScorer, Score
from raytune_llama.serve.generation.completion import Completion, CompletionService
from raytune_llama.serve.generation.model import ServedModel, load_served_model
from raytune_llama.storage.directories import fetched
from raytune_llama.storage.files import json_bytes
from raytune_llama.storage.hashes import hash_bytes, hash_file
from raytune_llama.tokenizer.loader import hash_tokenizer

logger = logging.getLogger(__name__)

NUM_SLOTS: Final = 16
"""Number of answers generated at a time."""

MERGED_PREFIX: Final = "merged-"
"""Start of the name of a directory in the run directory with a model merged for the evaluation."""

_ADAPTER = "adapter"
"""Key of the adapter, which every row of every pass uses."""


@dataclass(frozen=True)
class PromptIds:
    """A tokenized prompt to answer."""

    ids: tuple[int, ...]
    """Token ids; they leave room for an answer."""

    sampling: SamplingOptions
    """Sampling parameters."""

    max_tokens: int
    """Maximum number of generated tokens."""

    stops: tuple[str, ...] = ()
    """Stop strings."""

    continues_text: bool = False
    """Whether the answer continues the prompt's text."""


class InProcessModel:
    """A model in memory. Not thread-safe."""

    def __init__(self, served: ServedModel) -> None:
        """Wrap a loaded model, whose adapter, if any, is attached."""
        self.served: Final = served
        """The model with its tokenizer and chat template."""

        self._scorer = ContinuationScorer(served.model, max_context=served.max_context)
        self._loss = SummedLoss(served.model)

    def score(self, batch: Sequence[Candidates]) -> Iterator[tuple[int, tuple[Score, ...]]]:
        """Yield the scores of continuations; see `ContinuationScorer.score`."""
        return self._scorer.score(batch)

    @torch.inference_mode()
    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch in nats, as training evaluates it."""
        device = self.served.model.device
        tensors = (batch.ids_BT, batch.positions_BT, batch.labels_BT)
        return float(self._loss(*(tensor.to(device) for tensor in tensors)))

    def generate(self, prompts: Sequence[PromptIds]) -> list[Completion]:
        """Answer prompts, with continuous batching."""
        served = self.served
        scheduler = BatchScheduler(
            served.model,
            num_slots=NUM_SLOTS,
            max_context=served.max_context,
            num_tokens=len(served.tokenizer),
        )
        engine = TransformersEngine(scheduler, max_waiting=NUM_SLOTS)
        service = CompletionService(served, engine, SamplingDefaults())
        try:
            return asyncio.run(_answer_all(service, prompts, engine.capacity))
        finally:
            engine.close()


async def _answer_all(
    service: CompletionService, prompts: Sequence[PromptIds], num_at_once: int
) -> list[Completion]:
    free = asyncio.Semaphore(num_at_once)

    async def answer(prompt: PromptIds) -> Completion:
        request = service.prepare_ids(
            prompt.ids,
            prompt.sampling,
            prompt.max_tokens,
            stops=prompt.stops,
            continues_text=prompt.continues_text,
        )
        async with free:
            return await service.complete(request)

    return await asyncio.gather(*map(answer, prompts))


def load_model(
    config: EvaluatedModelConfig, *, field: str, scratch: Path, use_gpu: bool
) -> InProcessModel:
    """Load a model directory with its adapters.

    Args:
        config: settings of the model, which has a `path`.
        field: config field of the model, for errors.
        scratch: directory for a temporary merge of several adapters.
        use_gpu: whether to compute on the GPU.

    Raises:
        ConfigError: the model or an adapter is damaged, or they do not fit each other.
    """
    assert config.path is not None, "an endpoint is not loaded"
    device = torch.device("cuda" if use_gpu else "cpu")
    try:
        if len(config.adapters) > 1:
            return InProcessModel(_load_merged(config, scratch, device))
        base_config = _served_config(config, config.path)
        served = load_served_model(base_config, device)
        if config.adapters:
            folder = fetched(config.adapters[0])
            loaded = AdapterLoader(base_config, served).load(folder, config.label)
            if _changes_tables(loaded):
                return InProcessModel(_load_merged(config, scratch, device))
            served = _attach(loaded)
        return InProcessModel(served)
    except ConfigError as error:
        raise ConfigError([f"{field}.{problem}" for problem in error.problems]) from error
    except ValueError as error:
        raise ConfigError([f"{field}: {error}"]) from error


def _served_config(config: EvaluatedModelConfig, path: str) -> ServedModelConfig:
    return ServedModelConfig(
        path=path,
        precision=config.precision,
        template=config.template,
        allow_other_template=config.allow_other_template,
        max_context=config.max_context,
    )


def _load_merged(config: EvaluatedModelConfig, scratch: Path, device: torch.device) -> ServedModel:
    """Load a base with several adapters, merged as `raytune merge` does it."""
    assert config.path is not None
    with tempfile.TemporaryDirectory(dir=scratch, prefix=MERGED_PREFIX) as folder:
        target = str(Path(folder) / "model")
        logger.info("merging %d adapters into a temporary directory", len(config.adapters))
        merge_adapters(MergeConfig(base=config.path, adapters=config.adapters, target=target))
        return load_served_model(_served_config(config, target), device)


def _changes_tables(loaded: LoadedAdapter) -> bool:
    """Whether an adapter has low-rank updates of an embedding table or the output head."""
    tables = set(embedding_layers(loaded.served.model))
    return bool(tables.intersection(loaded.updates or ()))


def _attach(loaded: LoadedAdapter) -> ServedModel:
    """Return the model with the adapter in every row of every pass, or the merged copy."""
    if loaded.updates is not None:
        layers = LoraLayers(loaded.served.model)
        layers.attach(_ADAPTER, loaded.updates)
        layers.set_row_adapters([_ADAPTER])
    return loaded.served


def identify_model(config: EvaluatedModelConfig) -> dict[str, Any]:
    """Return what decides a model's results: hashes of its files, and how it is loaded.

    An endpoint's model can't be identified by more than its name and the tokenizer in the config.
    """
    loading = {
        "precision": config.precision,
        "template": config.template,
        "max_context": config.max_context,
    }
    if config.path is None:
        tokenizer = config.tokenizer and hash_tokenizer(fetched(config.tokenizer, weights=False))
        known = {"tokenizer": tokenizer} if tokenizer else {}
        return {"base_url": config.base_url, "model": config.model, **known}
    base, adapters = fetched(config.path), [fetched(folder) for folder in config.adapters]
    return {
        "model": fingerprint_model(base),
        "adapters": [hash_adapter(Adapter.open(folder)) for folder in adapters],
        "tokenizer": hash_tokenizer(base),
        "chat": _hash_chat([base, *adapters]),
        **{name: value for name, value in loading.items() if value not in (None, "auto")},
    }


def _hash_chat(folders: Sequence[Path]) -> str:
    """Return the hash of all that decides how a model's prompts are written."""
    found: list[Any] = []
    for folder in folders:
        files = [folder / "tokenizer_config.json", *sorted(folder.glob("**/*.jinja"))]
        hashes = {file.name: hash_file(file) for file in files if file.is_file()}
        tokens = hash_tokenizer(folder) if has_tokenizer(folder) else None
        recorded = find_chat_template([folder])
        found.append([hashes, tokens, recorded and recorded[1]])
    return hash_bytes(json_bytes(found))


def check_models(models: Sequence[EvaluatedModelConfig]) -> list[str]:
    """Return what is wrong with the directories of models, by field; only names are looked at."""
    problems: list[str] = []
    for number, model in enumerate(models):
        if model.path is not None and not (fetched(model.path) / "config.json").is_file():
            problems.append(
                f"models.{number}.path: {model.path} is no model directory, since it has no "
                "config.json; give one as `raytune merge` writes it"
            )
        for place, adapter in enumerate(model.adapters):
            if not (fetched(adapter) / "adapter_config.json").is_file():
                problems.append(
                    f"models.{number}.adapters.{place}: {adapter} is no adapter, since it has no "
                    "adapter_config.json; give the `adapter` directory of a run"
                )
        if model.tokenizer is not None and not fetched(model.tokenizer).is_dir():
            problems.append(f"models.{number}.tokenizer: {model.tokenizer} does not exist")
    return problems

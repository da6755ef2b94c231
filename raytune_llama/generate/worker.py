"""A model in this process that answers rows: serving's engine and its continuous batching.

    generator = Generator(config, cpus=2)
    records = await generator.answer(rows)

Calls may overlap: rows of several calls share the engine's slots, so that the end of one call
leaves no slot empty while another has rows. `RayWorker` is the same as an actor of Ray Data.
"""

import asyncio
import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import pyarrow as pa
import pydantic
import torch

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.generate.config import GenerateConfig
from raytune_llama.generate.prompts import PromptedRow
from raytune_llama.logs import setup_logging
from raytune_llama.serve.config import ReplicaConfig, SamplingDefaults, ServedModelConfig
from raytune_llama.serve.engine.protocol import SamplingOptions
from raytune_llama.serve.errors import ContextLengthError
from raytune_llama.serve.generation.completion import CompletionService, PreparedRequest
from raytune_llama.serve.generation.model import ServedModel, load_chat_encoder, load_served_model
from raytune_llama.storage.directories import fetched

logger = logging.getLogger(__name__)

_NUM_WAITING = 1_000_000  # nothing is refused: a job offers only what it has rows for
_PREFILL_TOKENS: Final = 1024  # nobody waits for a first token: large passes are the fastest
_ADAPTER = "adapter"

Unanswered = Literal["too_long", "unusable"]
"""Value of `finish_reason` of a row without an answer: its prompt has no room in the context, or it
can't be rendered."""


def describe_model(config: GenerateConfig) -> ServedModel:
    """Check a job's model and adapter and return them without weights, on the meta device.

    Raises:
        ConfigError: the model, the adapter or the template can't be used.
    """
    served_config = _served_config(config)
    try:
        served = load_served_model(served_config, torch.device("meta"))
    except ConfigError as error:
        raise ConfigError([f"model.{problem}" for problem in error.problems]) from error
    if config.model.adapter is not None:
        # Imports PEFT, which takes seconds.
        from raytune_llama.serve.adapters.loading import AdapterLoader

        try:
            loader = AdapterLoader(served_config, served)
            served = loader.describe(fetched(config.model.adapter), served.name)
        except (ValueError, OSError) as error:
            raise ConfigError([f"model.adapter: {error}"]) from error
    served = _with_template(served, config)
    if config.with_prompt and served.chat is None:
        raise ConfigError(
            [
                f"model.template: {config.model.path} has no chat template; name one, or set "
                "with_prompt=false"
            ]
        )
    return served


def _served_config(config: GenerateConfig) -> ServedModelConfig:
    """Return the config of the model in serving; the adapter may have the rank that it has."""
    served = config.served_model
    if config.model.adapter is None:
        return served
    from raytune_llama.model.adapter import Adapter

    adapter = Adapter.open(fetched(config.model.adapter), field="model.adapter")
    return replace(served, max_adapter_rank=adapter.max_rank)


def _with_template(served: ServedModel, config: GenerateConfig) -> ServedModel:
    """Return a model with an adapter with the template that the config asks for, if it does."""
    wanted, chat = config.template, served.chat
    if wanted is None or (chat is not None and chat.config.template == wanted):
        return served
    if not config.model.allow_other_template:
        own = "none" if chat is None else chat.template.name
        raise ConfigError(
            [
                f"model.template: got {wanted}, but the adapter was tuned with {own}; omit the "
                "field and the preset, or set model.allow_other_template=true"
            ]
        )
    other = load_chat_encoder(
        served.tokenizer, fetched(config.model.path), None, wanted=wanted, allow_other=True
    )
    return replace(served, chat=other)


class Generator:
    """A model with its adapter, loaded into this process."""

    def __init__(self, config: GenerateConfig, *, cpus: int) -> None:
        """Load the model and start its engine.

        Args:
            config: config of the job.
            cpus: number of compute threads.

        Raises:
            ConfigError: the model can't be used.
        """
        # Imports the engines, which the driver does not need.
        from raytune_llama.serve.backend import start_model

        self._config, self._served_config = config, _served_config(config)
        self._sampling = config.resolved_sampling
        scale = config.scale
        replica = ReplicaConfig(
            slots=scale.slots,
            waiting=_NUM_WAITING,
            use_gpu=scale.use_gpu,
            cpus=float(cpus),
            engine=scale.engine,
            prefill_tokens=scale.prefill_tokens,
        )
        self._started = start_model(
            self._served_config,
            replica,
            section="scale",
            default_prefill_tokens=_PREFILL_TOKENS,
        )
        self._attaching: asyncio.Task[CompletionService] | None = None

    def close(self) -> None:
        """Stop the engine."""
        self._started.engine.close()

    async def load_service(self) -> CompletionService:
        """Return what answers requests, with the adapter attached; all calls on one event loop."""
        if self._attaching is None:
            self._attaching = asyncio.create_task(self._attach())
        return await asyncio.shield(self._attaching)

    async def _attach(self) -> CompletionService:
        served, key = self._started.served, self._adapter_key
        if self._config.model.adapter is not None:
            folder = fetched(self._config.model.adapter)
            served = await self._started.attach_adapter(self._served_config, folder, _ADAPTER)
        self._served = _with_template(served, self._config)
        sampling = self._sampling
        defaults = SamplingDefaults(
            temperature=sampling.temperature or 0.0,
            top_p=sampling.top_p or 1.0,
            top_k=sampling.top_k or None,
            repetition_penalty=sampling.repetition_penalty or 1.0,
            max_tokens=sampling.max_new_tokens,
        )
        return CompletionService(self._served, self._started.engine, defaults, key)

    @property
    def _adapter_key(self) -> Hashable | None:
        return None if self._config.model.adapter is None else _ADAPTER

    async def answer(self, rows: Sequence[PromptedRow]) -> list[dict[str, Any]]:
        """Return the output of each row, in order; see `batch` for its fields.

        Raises:
            EngineError: the engine has failed.
        """
        service = await self.load_service()
        # Longest first: prompts that are read in one pass are padded to the longest of them.
        order = sorted(range(len(rows)), key=lambda place: -rows[place].num_characters)
        encoded = await asyncio.to_thread(lambda: {n: self._encode(rows[n]) for n in order})
        answered = [self._answer_row(service, rows[n], *encoded[n]) for n in order]
        records = dict(zip(order, await asyncio.gather(*answered), strict=True))
        return [records[place] for place in range(len(rows))]

    def _encode(self, row: PromptedRow) -> tuple[list[int], Unanswered | None, str | None]:
        """Return the token ids of a row's prompt, or why it can't be answered."""
        served = self._served
        if row.problem is not None:
            return [], "unusable", row.problem
        try:
            ids = self._encode_prompt(row)
        except ContextLengthError as error:
            return [], "too_long", str(error)
        except UserError as error:
            return [], "unusable", str(error)
        if len(ids) >= served.max_context:
            error = ContextLengthError(served.max_context, f"{len(ids)} tokens", "prompt")
            return ids, "too_long", str(error)
        return (ids, None, None) if ids else ([], "unusable", "the prompt has no tokens")

    def _encode_prompt(self, row: PromptedRow) -> list[int]:
        served, conversation = self._served, row.conversation
        if conversation is None:
            assert row.text is not None, "a row without a problem has a prompt"
            served.check_size([row.text], "prompt")
            return served.encode_texts([row.text])[0]
        served.check_size(conversation.texts, "messages")
        assert served.chat is not None, "checked before the start"
        return served.chat.encode_prompt(conversation).tolist()

    async def _answer_row(
        self,
        service: CompletionService,
        row: PromptedRow,
        ids: list[int],
        unanswered: Unanswered | None,
        problem: str | None,
    ) -> dict[str, Any]:
        record = row.describe() | {"output": None, "finish_reason": unanswered}
        record |= {"num_prompt_tokens": len(ids), "num_output_tokens": 0}
        if unanswered is not None:
            return record | {"error": problem}
        found = await service.complete(self._prepare(service, row, ids))
        return record | {
            "output": found.text,
            "finish_reason": found.finish_reason,
            "num_output_tokens": found.num_tokens,
        }

    def _prepare(
        self, service: CompletionService, row: PromptedRow, ids: list[int]
    ) -> PreparedRequest:
        sampling = self._sampling
        assert sampling.max_new_tokens is not None, "resolved"
        temperature = sampling.temperature or 0.0
        options = SamplingOptions(
            temperature=temperature,
            top_p=sampling.top_p or 1.0,
            top_k=sampling.top_k or None,
            repetition_penalty=sampling.repetition_penalty or 1.0,
            # Without a seed, the engine takes the greedy tokens of all rows at once.
            seed=sampling.seed + row.index if temperature else None,
        )
        return service.prepare_ids(
            ids,
            options,
            sampling.max_new_tokens,
            stops=sampling.stop,
            continues_text=row.conversation is None,
        )


ROWS: Final = pydantic.TypeAdapter(PromptedRow)
"""Turns rows into JSON and back, as they travel to workers."""

RESULT_SCHEMA: Final = pa.schema({"record": pa.string(), "problem": pa.string()})
"""Columns that workers return: a row's output in JSON, or why the worker can't work."""


class RayWorker:
    """Ray Data actor that answers a block of rows per call; calls overlap on its event loop.

    A mistake of the user is returned as data: an exception would reach the driver wrapped in Ray's
    own, indistinguishable from a bug of this package.
    """

    def __init__(self, config: Mapping[str, Any], cpus: int) -> None:
        """Load the model.

        Args:
            config: `GenerateConfig` as plain data.
            cpus: number of compute threads.
        """
        setup_logging()
        self._problem: str | None = None
        try:
            self._generator = Generator(from_dict(GenerateConfig, config), cpus=cpus)
        except UserError as error:
            self._problem = str(error)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer the rows in the column `row`."""
        if self._problem is not None:
            return _table([], self._problem)
        rows = [ROWS.validate_json(text) for text in batch.column("row").to_pylist()]
        try:
            return _table(await self._generator.answer(rows), None)
        except UserError as error:
            return _table([], str(error))


def _table(records: Sequence[Mapping[str, Any]], problem: str | None) -> pa.Table:
    written = [{"record": json.dumps(one, ensure_ascii=False)} for one in records]
    return pa.Table.from_pylist(
        written if problem is None else [{"problem": problem}], schema=RESULT_SCHEMA
    )

"""Real adapters of the tiny model, as our training writes them, and a pool that serves them."""

import asyncio
import copy
import os
import shutil
from collections.abc import Callable, Coroutine, Hashable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_llama.serve.adapters.loading import AdapterLoader
from raytune_llama.serve.adapters.pool import AdapterPool
from raytune_llama.serve.adapters.registry import AdapterRegistry
from raytune_llama.serve.config import SamplingDefaults, ServedModelConfig
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.scheduler import BatchScheduler
from raytune_llama.serve.generation.completion import CompletionService
from raytune_llama.serve.generation.model import ServedModel, load_served_model
from raytune_llama.serve.protocol.completions import CompletionRequest
from raytune_llama.storage.files import OUTPUT_MANIFEST, write_json_atomic
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import hash_tokenizer, load_tokenizer
from raytune_llama.train.export import fingerprint_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_TOKENS = 12


def write_adapter_directory(base: Path, folder: Path, *, seed: int, **fields: Any) -> Path:  # noqa: ANN401
    """Write a whole adapter beside its place and give it its name; an older one is replaced.

    Args:
        base: its base.
        folder: its place.
        seed: of its weights.
        fields: of PEFT's config; and `manifest`, of the manifest.
    """
    manifest = fields.pop("manifest", {})
    temporary = folder.with_name(f".{folder.name}.{seed}")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    values = {"r": 4, "lora_alpha": 16, "target_modules": LINEAR, **copy.deepcopy(fields)}
    attached: Any = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(parameter + noise)
    attached.save_pretrained(temporary)
    load_tokenizer(base).save_pretrained(temporary)
    written = {
        "base": fingerprint_model(base),
        "tokenizer_hash": hash_tokenizer(base),
        "files": {file.name: hash_file(file) for file in sorted(temporary.iterdir())},
        **manifest,
    }
    write_json_atomic(temporary / OUTPUT_MANIFEST, written)
    if folder.exists():
        folder.rename(folder.with_name(f".{folder.name}.old.{seed}"))
    temporary.rename(folder)
    return folder


def by_peft(base: Path, adapter: Path | None, prompt: str) -> str:
    """Return what PEFT generates, greedily, with the whole sequence anew for each token."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = load_tokenizer(base)
    ids = tokenizer.encode(prompt)
    tokens: list[int] = []
    with torch.inference_mode():
        while len(tokens) < NUM_TOKENS:
            logits = model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, -1]
            # Rows behind the tokenizer's ids are never generated.
            token = int(logits[: len(tokenizer)].argmax())
            if token == tokenizer.eos_token_id:
                break
            tokens.append(token)
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def asked(model: str, prompt: str = "the quick", **fields: Any) -> CompletionRequest:  # noqa: ANN401
    values = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS}
    return CompletionRequest.model_validate(values | fields)


@dataclass
class Adapters:
    """A pool over a folder of adapters."""

    pool: AdapterPool
    base: Path
    folder: Path
    served: ServedModel
    """The base."""

    async def text(self, name: str | None, prompt: str = "the quick") -> str:
        """Return what is answered with an adapter, or by the base."""
        text = ""
        request = asked("tiny" if name is None else f"tiny:{name}", prompt)
        async with aclosing(await self.pool.respond(request)) as stream:
            async for delta in stream.deltas:
                text += delta.text
        return text

    def write(self, name: str, *, seed: int, **fields: Any) -> Path:  # noqa: ANN401
        """Write an adapter, or another version of it."""
        return write_adapter_directory(self.base, self.folder / name, seed=seed, **fields)

    def wanted(self, name: str | None, prompt: str = "the quick") -> str:
        """Return what PEFT generates with an adapter as it lies there now."""
        return by_peft(self.base, None if name is None else self.folder / name, prompt)

    async def wait_for(self, name: str, text: str) -> None:
        """Wait until an adapter answers so."""
        async with asyncio.timeout(120):
            while await self.text(name) != text:
                await asyncio.sleep(0.02)


MakeAdapters = Callable[..., Adapters]
T = TypeVar("T")


@pytest.fixture
def base_dir(served_dir: Path, tmp_path: Path) -> Path:
    """A base of a test's own."""
    path = tmp_path / "base" / "tiny"
    shutil.copytree(served_dir, path, copy_function=os.link)
    return path


@pytest.fixture
def make_adapters(base_dir: Path, tmp_path: Path) -> Iterator[MakeAdapters]:
    engines: list[TransformersEngine] = []

    def make(*, place: Place | None = None, **fields: Any) -> Adapters:  # noqa: ANN401
        folder = tmp_path / "adapters"
        folder.mkdir()
        place = place or Place.local(folder)
        config = ServedModelConfig(path=str(base_dir), adapters_dir=str(place), **fields)
        served = load_served_model(config, torch.device("cpu"))

        def make_stepper(served: ServedModel) -> BatchScheduler:
            return BatchScheduler(
                served.model,
                num_slots=16,
                max_context=served.max_context,
                num_tokens=len(served.tokenizer),
            )

        engine = TransformersEngine(make_stepper(served), max_waiting=100)
        engines.append(engine)

        async def attach_copy(key: Hashable, served: ServedModel) -> None:
            await engine.attach_copy(key, make_stepper(served))

        def make_answerer(served: ServedModel, adapter: Any) -> CompletionService:  # noqa: ANN401
            return CompletionService(served, engine, SamplingDefaults(), adapter)

        pool = AdapterPool(
            make_answerer(served, None),
            AdapterRegistry.from_path(str(place)),
            AdapterLoader(config, served),
            engine,
            make_answerer=make_answerer,
            attach_copy=attach_copy,
            max_adapters=config.max_adapters,
        )
        return Adapters(pool, base_dir, folder, served)

    yield make
    for engine in engines:
        engine.close()


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run an asynchronous test."""
    return asyncio.run(main())

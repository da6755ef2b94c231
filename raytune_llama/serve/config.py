"""What an endpoint is made of: models, their copies, who may ask, and how much."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_llama.chat.templates.names import TemplateName
from raytune_llama.config.settings import ConfigError, load, settings


@settings
class SamplingDefaults:
    """What a request that does not say gets; OpenAI's defaults."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """0: always the likeliest token."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the probability that is drawn from."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    """How many of the likeliest tokens are drawn from; null: all."""

    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Above 1: tokens that are there already become less likely."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """New tokens; null: what the context has room for."""


@settings
class ServedModelConfig:
    """A model, and how it is loaded."""

    path: Annotated[str, Field(min_length=1)]
    """Model directory, as `jobs/merge.py` writes it; safetensors only."""

    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^:\s]+$")] | None = None
    """What requests call it; null: the directory's name. Has no colon, behind which an adapter
    is named."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the weights; auto: as they are stored, but in single precision on CPUs."""

    template: TemplateName | None = None
    """How conversations are written; null: as the model was tuned, or else the tokenizer's own."""

    allow_other_template: bool = False
    """Serve with another template than the model was tuned with."""

    max_context: Annotated[int, Field(ge=2)] | None = None
    """Tokens of a request, prompt and answer; null: what the model has positions for."""

    verify: bool = True
    """Compare the files with the hashes in the directory's manifest, where it has one; those of
    adapters too."""

    adapters_dir: Annotated[str, Field(min_length=1)] | None = None
    """Folder of adapter directories, local or `s3://...` or `gs://...`; requests choose one as
    `model:adapter`, and one that is written anew is used from then on. A local one has to be on
    the nodes that speak HTTP too. null: no adapters."""

    max_adapters: Annotated[int, Field(ge=1)] = 8
    """Adapters in memory at a time, beside old versions that requests still use."""

    @property
    def served_name(self) -> str:
        """What requests call it."""
        return self.name or Path(self.path).resolve().name.replace(":", "-")


@settings
class ReplicaConfig:
    """Copies of a model, and what each takes."""

    min: Annotated[int, Field(ge=0)] = 1
    """Fewest; 0: none while nobody asks, and the first request waits for one."""

    max: Annotated[int, Field(ge=1)] = 1
    """Most."""

    slots: Annotated[int, Field(ge=1, le=1024)] = 16
    """Requests that a replica answers at a time."""

    waiting: Annotated[int, Field(ge=0)] = 64
    """Requests that wait for all replicas together; more are refused with 429."""

    target_ongoing: Annotated[float, Field(gt=0)] | None = None
    """Requests a replica is to have, above which one more is started; null: half its slots."""

    upscale_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long there must be too many before one more is started."""

    downscale_seconds: Annotated[float, Field(ge=0)] = 300.0
    """How long there must be too few before one is stopped; what it answers is ended first."""

    drain_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long a replica that is stopped may take to end its answers."""

    surge: bool = True
    """Start a new version's replica before the old one is stopped, for which there must be room;
    false: the old one goes first, and requests wait."""

    use_gpu: bool = False
    """Answer on a GPU, one a replica."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs reserved for a replica; as many threads compute, at least one."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What generates; auto: vLLM where the replicas use a GPU, it is installed and the model has no
    folder of adapters, which it does not serve here."""

    prefill_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of prompts, padding included, that are read between two tokens of the others' answers;
    null: 256, and on vLLM as it sees fit."""

    @model_validator(mode="after")
    def _check(self) -> "ReplicaConfig":
        if self.min > self.max:
            raise ConfigError([f"min: got {self.min}, more than max, {self.max}"])
        return self


@settings
class RequestLimits:
    """Bounds on every request, whoever asks."""

    body_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**20
    """Of a request; larger ones are refused as they arrive, with 413."""

    header_bytes: Annotated[int, Field(ge=1024)] = 64 * 2**10
    """Of a request's path and headers together; more are refused with 431."""

    json_depth: Annotated[int, Field(ge=8, le=200)] = 64
    """Objects and lists within one another; deeper ones are refused before they are read."""

    body_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a request's body may take to arrive; then it is refused with 408."""

    queue_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest wait for an answer's first token; then it is refused with 503."""

    request_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest whole answer; then it is refused with 504, and a stream ends with an error."""

    send_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long a client may leave what it was sent unread; then its answer is ended."""

    allow_origins: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Web pages that browsers let ask, `https://example.org`, or `*`: all. None: no other page."""


@settings
class KeyLimits:
    """What one key may ask for, over all gateways together; without keys, everybody together."""

    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Requests, on average; as many at once. null: any number."""

    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests that are being answered at a time; null: any number."""


@settings
class ServeConfig:
    """An endpoint."""

    models: Annotated[tuple[ServedModelConfig, ...], Field(min_length=1)]
    """What is served; requests choose by name."""

    keys_file: str | None = None
    """File of the hashes of API keys, on every node that speaks HTTP; null: no keys but those in
    the variable RAYTUNE_LLAMA_API_KEYS, and without any, on loopback only."""

    limits: RequestLimits = RequestLimits()
    """Bounds on every request."""

    key_limits: KeyLimits = KeyLimits()
    """What a key may ask for."""

    defaults: SamplingDefaults = SamplingDefaults()
    """What requests get that don't say."""

    replicas: ReplicaConfig = ReplicaConfig()
    """Of each model."""

    gateways: Annotated[int, Field(ge=1)] = 2
    """Processes that speak HTTP for the models; while one is replaced, another answers."""

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        names = [model.served_name for model in self.models]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigError([f"models: {', '.join(doubled)} stands there twice; give names"])
        return self


def read_arguments(arguments: Mapping[str, Any]) -> ServeConfig:
    """Return the config that the arguments of `serve run` or of an application's YAML give.

    Args:
        arguments: fields, also by dotted paths (`replica_check.max`), values as text or plain data;
            `model_dir` stands for one model's path.

    Raises:
        ConfigError: all that is wrong.
    """
    data = dict(arguments)
    if "model_dir" in data:
        if "models" in data:
            raise ConfigError(["model_dir: got models too, wanted one of them"])
        data = {"models": [{"path": data.pop("model_dir")}], **data}
    # Texts come from a command line, where 2 is a number.
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in data.items()}
    return load(ServeConfig, [f"{name}={text}" for name, text in texts.items()])

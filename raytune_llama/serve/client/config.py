"""Settings of the terminal chat."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings


@settings
class TerminalConfig:
    """Terminal chat with an endpoint; the API key is in the environment variable OPENAI_API_KEY."""

    url: str = "http://127.0.0.1:8000/v1"
    """Base URL of the API, up to /v1."""

    model: Annotated[str, Field(min_length=1)] | None = None
    """Model, or model:adapter; null: the endpoint's only model, or one chosen from its list."""

    system: str | None = None
    """System message; null: the default of the model's chat template."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """Sampling temperature; 0: greedy. Null, here and below: the endpoint's default."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Probability mass of nucleus sampling."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    """Number of most likely tokens to sample from; not every endpoint supports it."""

    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    """Above 1: repeated tokens become less likely; not every endpoint supports it."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of tokens per response."""

    seed: int | None = None
    """Sampling seed; the same seed gives the same response if the endpoint supports it."""

    usage: bool = False
    """Whether to print token counts and throughput after each response, on stderr."""

    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without data from the endpoint after which a request fails."""

    @model_validator(mode="after")
    def _check(self) -> "TerminalConfig":
        try:
            parts = urlsplit(self.url)
            is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:  # unclosed bracket, invalid port
            is_url, parts = False, urlsplit("")
        if not is_url:
            raise ConfigError([f"url: got {self.url!r}, wanted e.g. http://127.0.0.1:8000/v1"])
        if parts.username or parts.password:
            raise ConfigError(["url: contains a user name or password; set OPENAI_API_KEY instead"])
        return self

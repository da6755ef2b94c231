"""What `serve run` and `serve deploy` take.

    serve run serve.app:app model_dir=demo/model
    serve deploy serve/config.yaml

Arguments are the fields of `raytune_llama.serve.config.ServeConfig`, also by dotted paths, such as
`replicas.max=4`; `model_dir` stands for one model's path.
"""

from typing import Any

from ray.serve import Application

from raytune_llama.logs import setup_logging
from raytune_llama.serve.app import build_app
from raytune_llama.serve.config import read_arguments


def app(arguments: dict[str, Any]) -> Application:
    """Build the endpoint.

    Raises:
        ConfigError: all that is wrong with the arguments.
    """
    setup_logging()
    return build_app(read_arguments(arguments))

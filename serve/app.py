"""What `serve run` and `serve deploy` take from a checkout.

    serve run serve.app:app model_dir=demo/model
    serve deploy serve/config.yaml

An installed package has the same applications in `raytune_llama.serve.app`.
"""

from raytune_llama.serve.app import app, gateway

__all__ = ["app", "gateway"]

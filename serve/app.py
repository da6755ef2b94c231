"""What `serve run serve.app:app` takes from a checkout.

    serve run serve.app:app model_dir=demo/model
    serve deploy serve/config.yaml

An installed package has the same application under `raytune_llama.serve.app:app`.
"""

from raytune_llama.serve.app import app

__all__ = ["app"]

"""Serving: a model directory becomes an OpenAI-compatible endpoint on Ray Serve.

Read `app` first: it deploys one group of replicas per model. A replica is the HTTP server of its
model, to which `proxy` forwards: a request passes http -> backend -> generation -> engine.
"""

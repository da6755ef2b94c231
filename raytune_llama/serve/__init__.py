"""Serving: a model directory becomes an OpenAI-compatible endpoint on Ray Serve.

Read `app` first: it deploys the gateways (HTTP, no torch), the rate limiter that they share and
one group of replicas per model. A request passes http -> gateway -> replica -> generation ->
engine.
"""

"""OpenAI's API over HTTP: routes, API keys, rate limits, timeouts, metrics and the chat page.

It imports no torch and no Ray; a model is behind the `ModelBackend` protocol. Read `routes` first:
it builds the application and lists the middleware in its order.
"""

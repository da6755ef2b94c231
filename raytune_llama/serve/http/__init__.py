"""OpenAI's API over HTTP: routes, API keys, rate limits, timeouts, metrics and the chat page.

Imports neither torch nor Ray; models implement the `ModelBackend` protocol. Read `routes` first:
it builds the application and lists the middleware in its order.
"""

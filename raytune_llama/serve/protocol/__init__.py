"""OpenAI's requests and responses as pydantic models: numbers are bounded, unknown fields rejected.

This is the wire format: it imports neither HTTP nor an engine. Read `chat` first; `tools` and
`embeddings` hold the models of tool calls and of `/v1/embeddings`. `responses_api`, with
`input_items` and `response_events`, is `/v1/responses`.
"""

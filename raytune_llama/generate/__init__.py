"""Using a model: answers to a file of prompts, a chat in the terminal, and making data.

Batch inference: read `batch` first, which runs a job; `prompts` reads the input, `worker` generates
on a model in its own process, `parts` keeps what is finished. `interactive` is the chat.

`make_data` asks any endpoint for instruction data.
"""

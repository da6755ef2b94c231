"""Making instruction data with any OpenAI-compatible endpoint, as `raytune make-data` does.

Read `job` first: it sends prompts and keeps rows. `prompt` writes the prompts from `lists/`,
`endpoint` asks and retries, `reading` decides what is kept, with `replies` (text to rows) and
`duplicates`; `record` writes everything to disk, and `counts` sums it up.
"""

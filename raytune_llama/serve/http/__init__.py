"""OpenAI's API over HTTP; knows no model and no Ray."""

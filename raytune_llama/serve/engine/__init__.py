"""What generates: token ids in, tokens out, many requests at a time."""

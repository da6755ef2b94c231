"""Conversations in, token ids and a mask of what is learned out."""

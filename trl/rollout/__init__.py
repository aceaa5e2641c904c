"""Rollout: a language model writes a response to each query."""

"""The policy's parts: a value head, the language head, and what training asks of a model."""

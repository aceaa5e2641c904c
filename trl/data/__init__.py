"""Rows: where prompts, answers and texts come from."""

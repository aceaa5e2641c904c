"""Whole runs on top of the trainer: the demo, its report."""

"""Environments: what a policy talks to over many turns, and the tools that it calls."""

"""Where the recipes are that ship with trl."""

from __future__ import annotations

from pathlib import Path


def recipe_folder() -> Path:
    """Return the folder of the recipes that ship with trl."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"

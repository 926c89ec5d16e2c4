"""What comes with pftools beside its modules: the notebooks, and studies, tasks and questions in `data`.

In a clone they are beside the package, for people to read and change. In a wheel they are inside of it, where
`setup.py` puts them.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CLONE = _PACKAGE.parent
_HOME = _CLONE if (_CLONE / "notebooks" / "00_plan_study.ipynb").exists() else _PACKAGE / "_shipped"

NOTEBOOKS = _HOME / "notebooks"
DATA = _HOME / "data"
NOTEBOOK_OF = {
    "calibrate": "01_calibrate.ipynb",
    "prune": "02_prune.ipynb",
    "finetune": "03_finetune.ipynb",
    "evaluate": "04_evaluate.ipynb",
    "analyse": "05_analyse_weights.ipynb",
}


def shipped_studies() -> dict[str, Path]:
    """{name: file} of the studies that come with pftools."""
    return {path.stem: path for path in sorted((DATA / "studies").glob("*.yaml"))}

"""The model card of an exported model: what was done to the base, with what, and what it is worth now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pftools import contents, run_folder
from pftools.corpora.data_root import DATA_SETS
from pftools.settings import EMBEDDED_MODEL, STEPS

_EMBEDDED = ("HuggingFaceTB/SmolLM2-135M", "apache-2.0")  # its name on the hub, its licence
_SHOWN = {
    "prune": "method pattern sparsity inputs allocation reconstruct_steps corpus n_blocks block_length seed",
    "finetune": "corpus tokens steps epochs learning_rate adapter rank alpha targets base seed",
}
_LETTERS = {"prune": "P", "finetune": "F"}
_NOTEBOOKS = {"prune": "02_prune", "finetune": "03_finetune"}


def model_card(base: str, chain: list[Path], sparsity: float) -> str:
    """The text of a model card, with the hub's metadata above it.

    Args:
        base: the base model, as the oldest run names it.
        chain: the runs that lead from it to the model, oldest first.
        sparsity: measured in the model, between 0 and 1.
    """
    from huggingface_hub import ModelCardData

    records = [_record(folder) for folder in chain]
    name, licence = _origin(base)
    told = licence.get("license_name") or licence.get("license")
    corpora = {record["parameters"].get("corpus") for record in records} - {None}
    hub = [source for corpus in sorted(corpora) if (source := _on_the_hub(corpus))]
    data = ModelCardData(
        base_model=name,
        **licence,
        datasets=list(dict.fromkeys(hub)) or None,
        metrics=["perplexity"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "pftools"],
    )
    word = " ".join(_LETTERS[record["step"]] for record in records)
    source = f"[{name}](https://huggingface.co/{name})" if name else f"`{Path(base).name}`"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name or Path(base).name}, {word}",
        f"Made from {source} by the ordering **{word}** (P prunes, F fine-tunes with a low-rank adapter), "
        f"with pftools {records[-1]['versions']['pftools']}. {_asked(records)}{sparsity:.2%} of the linear "
        "weights of the decoder layers are zero. A zero takes as much room as any number: this model is "
        "not smaller or faster by itself.",
        "## What was done",
        _steps(records),
        "## What it is worth",
        _worth(base, chain),
        "## Licence",
        f"That of the base model{f': {told}' if told else ', see there'}.",
        "## Again",
        "Each step starts from the model that the one before has left:",
        "```sh\n" + "\n".join(map(_command, records)) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def adapter_card(base: str, run: Path, before: list[Path]) -> str:
    """The README of an exported masked adapter: what it is, and how to merge it.

    Args:
        base: the base model, as the oldest run names it.
        run: of the adapter.
        before: the runs that made the model that it was trained on, where masks alone do not make it out of
            ``base``.
    """
    dtype = run_folder.read_record(run)["results"].get("dtype", "auto")
    name = base if not Path(base).expanduser().is_dir() else f"path/to/{Path(base).name}"
    if before:
        start = (
            f"Before it was trained, `{Path(name).name}` was changed by more than masks: merge it into what "
            f"`pftools export {before[-1].name} parent` writes."
        )
        model = "parent"
    else:
        start = f"The masks make the model that it was trained on out of `{Path(name).name}`."
        model = name
    return f"""# A masked adapter

A low-rank adapter of a pruned model in PEFT's format, with the masks of that model beside it
(`masks.safetensors`, one bit a weight, 1 = kept). It was trained for a *masked* merge:
W + (alpha / rank) * (W != 0) * (B @ A). PEFT adds the whole product, which fills the zeros and is another
model.

{start} Merge with pftools, which checks the zeros first:

```python
from pftools.finetune import merge_adapter
from pftools.models import load_model

model, tokenizer = load_model("{model}", dtype="{dtype}")
merge_adapter(model, "this/folder")
model.save_pretrained("merged")
tokenizer.save_pretrained("merged")
```
"""


def _record(folder: Path) -> dict[str, Any]:
    """The record of a run; of one that was pruned on a calibrate run's blocks, with what these are."""
    record = run_folder.read_record(folder)
    given = record["parameters"]
    calibration = folder.parent / Path(given.get("calibration") or "none").name
    if run_folder.is_finished(calibration):
        blocks = run_folder.read_record(calibration)["parameters"]
        chosen = {name: blocks[name] for name in ("corpus", "n_blocks", "block_length")}
        record = {**record, "parameters": {**given, **chosen}}
    return record


def _asked(records: list[dict[str, Any]]) -> str:
    asked = [record["parameters"]["sparsity"] for record in records if record["step"] == "prune"]
    return f"{asked[-1]:.2%} was asked, and " if asked else ""


def _on_the_hub(corpus: str) -> str | None:
    """The id of the data set that a corpus is; None: it is none of the hub."""
    if corpus in DATA_SETS:
        return DATA_SETS[corpus].hub.get("path")
    found = contents.data_set_of(corpus)
    return found[0] if found else None


def _origin(base: str) -> tuple[str | None, dict[str, Any]]:
    """The base model's id on the hub (None: it has none), and what its card says of its licence."""
    if base == EMBEDDED_MODEL:
        name, licence = _EMBEDDED
        return name, {"license": licence}
    folder = Path(base).expanduser()
    return (None, _licence(str(folder / "README.md"))) if folder.is_dir() else (base, _licence(base))


def _licence(source: str) -> dict[str, Any]:
    """{"license": ...}, with name and link where the hub has no word for it; empty where no card says it.

    Args:
        source: a model card's file, or a model's id on the hub.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard.load(source).data
    except Exception:  # no card, a damaged one, or no hub, which fails in many ways
        return {}
    told = {name: card.get(name) for name in ("license", "license_name", "license_link")}
    return {name: text for name, text in told.items() if isinstance(text, str)}


def _steps(records: list[dict[str, Any]]) -> str:
    rows = ["| step | with | measured sparsity |", "|---|---|---|"]
    for record in records:
        given = record["parameters"]
        names = [name for name in _SHOWN[record["step"]].split() if given.get(name) not in (None, "")]
        shown = [f"{name} {given[name]}" for name in names if (name, given[name]) != ("reconstruct_steps", 0)]
        measured = record["results"].get("measured")
        told = "" if measured is None else f"{measured:.2%}"
        rows.append(f"| {record['step']} | {', '.join(shown)} | {told} |")
    return "\n".join(rows)


def _worth(base: str, chain: list[Path]) -> str:
    """Perplexities of the model beside its base's, from evaluations in the same runs folder."""
    own = _evaluations(chain[-1])
    if not own:
        return "It was not evaluated where it was made."
    dense = {_place(record): record for record in _evaluations(base, chain[-1].parent)}
    rows = ["| text | blocks | perplexity | of the base |", "|---|---|---|---|"]
    for record in own:
        found, before = record["results"], dense.get(_place(record))
        reference = f"{before['results']['perplexity']:.2f}" if before else ""
        blocks = f"{found['n_blocks']} of {found['block_length']} tokens"
        rows.append(
            f"| {found['corpus']}, {found['split']} | {blocks} | {found['perplexity']:.2f} | {reference} |"
        )
        rows += [
            f"| {task} | {score['n']} questions | {score['metric']} {score['value']:.1%} | |"
            for task, score in found["tasks"].items()
            if score.get("low") is not None
        ]
    return "\n".join(rows)


def _place(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record["results"].get(key) for key in ("corpus", "split", "n_blocks", "block_length"))


def _evaluations(model: str | Path, runs: Path | None = None) -> list[dict[str, Any]]:
    """The records of finished evaluations of a model: of a run beside it, of another where it is said."""
    folder = runs or Path(model).parent
    found = []
    for run in sorted(folder.glob("evaluate-*")):
        if run_folder.is_finished(run):
            record = run_folder.read_record(run)
            asked = record["parameters"]["model"]
            if asked == str(model) or (runs is None and Path(asked).name == Path(model).name):
                found.append(record)
    return found


def _command(record: dict[str, Any]) -> str:
    """The papermill call of a step, with the parameters that differ from their defaults."""
    kind, given = STEPS[record["step"]], record["parameters"]
    changed = {
        name: given[name]
        for name in kind.key_fields()
        if name in given and name not in kind.parents and given[name] != kind.model_fields[name].default
    }
    shown = " ".join(f"-p {name} {json.dumps(value)}" for name, value in changed.items())
    return f"papermill notebooks/{_NOTEBOOKS[record['step']]}.ipynb out.ipynb -p model MODEL {shown}".rstrip()

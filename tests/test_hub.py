"""Models and texts of the hub, and what is pushed there, against a hub that answers (`tests/hub.py`)."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pandas as pd
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from pftools.corpora.data_root import DATA_SETS, read_split
from tests.hub import TOKEN, Hub, serving
from tests.tiny import save_tiny

STORIES = [
    {"story": f"Tale {number}. It was a dark night, and the rain fell for {number} days.", "number": number}
    for number in range(60)
]
TALKS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(60)
]
CARD = "---\nlicense: mit\n---\n# Tales\n"


def lines(rows):
    return "\n".join(map(json.dumps, rows))


def parquet(rows, folder):
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


def rows_of(source):
    return [{column: f"{column} {number}" for column in source.columns} for number in range(8)]


def published(source):
    """The files of a data set that `pftools fetch-data` asks for."""
    content = lines(rows_of(source))
    if "data_files" in source.hub:
        return {path: gzip.compress(content.encode()) for path in source.hub["data_files"].values()}
    name = source.hub["name"]
    files = "".join(f"  - split: {split}\n    path: {name}/{split}.jsonl\n" for split in source.splits)
    card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n"
    return {"README.md": card, **{f"{name}/{split}.jsonl": content for split in source.splits}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    hub = Hub()
    model = save_tiny(folder / "tiny", max_position_embeddings=512)
    (model / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Tiny\n")
    hub.add("models/somebody/tiny", model)
    hub.add("models/somebody/gated", model, gated=True)
    hub.add("models/somebody/empty", {"README.md": "# Nothing\n"})
    parts = {"train": STORIES[:40], "validation": STORIES[40:50], "test": STORIES[50:]}
    hub.add("datasets/somebody/tales", {f"{split}.jsonl": lines(rows) for split, rows in parts.items()})
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-00000-of-00001.parquet\n" for split in parts)
        for name in ("bright", "dark")
    )
    hub.add(
        "datasets/somebody/columns",
        {"README.md": f"---\nconfigs:\n{configs}---\n# Tales\n"}
        | {
            f"{name}/{split}-00000-of-00001.parquet": parquet([{**row, "mood": name} for row in rows], folder)
            for name in ("bright", "dark")
            for split, rows in parts.items()
        },
    )
    hub.add("datasets/somebody/talks", {"README.md": CARD, "data.jsonl": lines(TALKS)})
    hub.add("datasets/somebody/gated", {"README.md": CARD, "train.jsonl": lines(STORIES)}, gated=True)
    for source in DATA_SETS.values():
        if source.hub:
            hub.add(f"datasets/{source.hub['path']}", published(source))
    with serving(hub):
        yield hub
    assert not hub.unknown, "routes that tests/hub.py lacks"


_ASK = """
import json, sys
from pftools import checkpoints, corpora, models

def said(ask, *words, **more):
    try:
        return ask(*words, **more)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"

asked = json.load(sys.stdin)
told = {
    corpus: said(corpora.documents, corpus, split=split)
    for corpus, split in asked.get("corpora", {}).items()
}
for name in asked.get("models", ()):
    found = said(models.load_model, name, dtype="float32")
    told[name] = found if isinstance(found, str) else type(found[0]).__name__
told |= {
    place: said(checkpoints.push, folder, place) for place, folder in asked.get("pushes", {}).items()
}
print(json.dumps(told))
"""


def ask(hub, home, *, token="", before="", **asked):
    """What a process is told that asks the hub for corpora, models and pushes: {name: answer}."""
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", before + _ASK],
        env=hub.environment(home, token=token),
        cwd=home,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def is_a_sentence(said, *words):
    assert said.startswith("PftoolsError: ") and said.endswith(".") and "\n" not in said, said
    assert all(word in said for word in words), said


def test_data_sets_of_the_hub_are_read_by_name_and_column(hub, tmp_path):
    asked = {
        "somebody/tales:story": "validation",
        "somebody/columns/dark:mood": "test",
        "somebody/columns/bright:story": "train",
        "somebody/talks:messages": "train",
        "somebody/tales:stroy": "train",
        "somebody/tales:number": "train",
        "somebody/columns:story": "train",
        "somebody/columns/grey:story": "train",
        "somebody/nothing:text": "train",
        "somebody/gated:story": "train",
    }
    found = ask(hub, tmp_path, corpora=asked)
    stories = [row["story"] for row in STORIES]
    assert found["somebody/tales:story"] == stories[40:50]
    assert found["somebody/columns/dark:mood"] == ["dark"] * 10
    assert found["somebody/columns/bright:story"] == stories[:40]
    talks = [json.loads(text) for text in found["somebody/talks:messages"]]
    assert 30 < len(talks) < 60 and all(talk in [row["messages"] for row in TALKS] for talk in talks)
    is_a_sentence(found["somebody/tales:stroy"], "has no column stroy: it has story, number")
    is_a_sentence(found["somebody/tales:number"], "row 1, has a number in the column 'number'")
    is_a_sentence(
        found["somebody/columns:story"], "bright", "dark", "as somebody/columns/CONFIGURATION:story"
    )
    is_a_sentence(found["somebody/columns/grey:story"], "grey", "bright", "dark")
    is_a_sentence(found["somebody/nothing:text"], "doesn't exist on the Hub or cannot be accessed", "mend")
    is_a_sentence(found["somebody/gated:story"], "gated", "hf auth login")
    assert (tmp_path / ".cache/huggingface/datasets").is_dir()
    found = ask(
        hub, tmp_path, token=TOKEN, corpora={"somebody/gated:story": "train"}, models=["somebody/gated"]
    )
    is_a_sentence(found["somebody/gated:story"], "gated", "ask for access")
    is_a_sentence(found["somebody/gated"], "gated", "ask for access")


def test_models_of_the_hub_are_loaded_into_a_cache_of_ones_own(hub, tmp_path):
    asked = ["somebody/tiny", "somebody/gated", "somebody/nothing", "somebody/empty"]
    found = ask(hub, tmp_path, models=asked)
    assert found["somebody/tiny"] == "LlamaForCausalLM"
    assert (tmp_path / ".cache/huggingface/hub/models--somebody--tiny/refs/main").exists()
    is_a_sentence(found["somebody/gated"], "gated", "hf auth login")
    is_a_sentence(found["somebody/nothing"], "not a valid model identifier", "hf auth login")
    is_a_sentence(found["somebody/empty"], "has no config.json")


# The libraries ask five times, and wait for half a minute in all.
_IMPATIENT = "import time; time.sleep = lambda seconds: None\n"


def test_a_hub_that_is_down_is_one_sentence_and_what_is_cached_still_works(hub, tmp_path):
    asked = {"corpora": {"somebody/tales:story": "test"}, "models": ["somebody/tiny"]}
    assert ask(hub, tmp_path / "one", **asked)["somebody/tiny"] == "LlamaForCausalLM"
    down = Hub()
    with serving(down):
        pass
    found = ask(down, tmp_path / "one", before=_IMPATIENT, **asked)
    assert found["somebody/tales:story"][0].startswith("Tale 50.")
    assert found["somebody/tiny"] == "LlamaForCausalLM"
    found = ask(down, tmp_path / "other", before=_IMPATIENT, **asked)
    is_a_sentence(found["somebody/tales:story"], "Couldn't reach", "network")
    is_a_sentence(found["somebody/tiny"], "couldn't connect", "network")


def test_a_data_root_is_filled_from_the_hub(hub, tmp_path):
    """All data sets but FreebaseQA, which has an address of its own."""
    there = {name: source for name, source in DATA_SETS.items() if source.hub}
    only = [word for name in there for word in ("--only", name)]
    pftools(hub, tmp_path, "fetch-data", "data-root", *only)
    for name, source in there.items():
        for split in source.splits:
            assert read_split(name, split, data=tmp_path / "data-root") == rows_of(source)
    said = pftools(hub, tmp_path, "fetch-data", "data-root", *only)
    assert said.count("there already") == sum(len(source.splits) for source in there.values())


@pytest.mark.slow
def test_a_study_of_the_hub_runs_and_its_model_is_pushed_there(hub, tmp_path):
    (tmp_path / "hub.yaml").write_text(
        "model: somebody/tiny\norderings: [prune_finetune]\ntokens: 256\ndtype: float32\n"
        "calibrate: {corpus: 'somebody/tales:story', n_blocks: 4, block_length: 32}\n"
        "finetune: {corpus: 'somebody/columns/dark:story', block_length: 32, blocks_per_step: 2}\n"
        "evaluate: {corpus: 'somebody/tales:story', block_length: 32, n_blocks: 4, tasks: []}\n"
    )
    pftools(hub, tmp_path, "run", "hub.yaml", "--no-report")
    (run,) = (tmp_path / "runs").glob("finetune-*")
    inputs = json.loads((run / "run.json").read_text())["inputs"]
    assert inputs["corpus/train"] == f"revision {hub.repositories['datasets/somebody/columns'].sha}"
    (pruned,) = (tmp_path / "runs").glob("prune-*")
    inputs = json.loads((pruned / "run.json").read_text())["inputs"]
    assert inputs["model"] == f"revision {hub.repositories['models/somebody/tiny'].sha}"

    # What a larger model has left there goes, and what its owner has put there stays.
    old = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": "{}", "notes.md": "Mine."}
    pushed = hub.add("models/somebody/pruned", old, private=True)
    words = ("export", str(run), "model", "--push", "somebody/pruned")
    said = pftools(hub, tmp_path, *words, token=TOKEN)
    assert f"Pushed to {hub.address}/somebody/pruned." in said.replace("\n", "")
    written = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert pushed.files == {**written, "notes.md": b"Mine."}
    card = ModelCard(written["README.md"].decode())
    assert card.data.base_model == "somebody/tiny" and card.data.license == "cc-by-4.0"
    assert card.data.datasets == ["somebody/columns", "somebody/tales"]
    for name in (card.data.base_model, *card.data.datasets):
        validate_repo_id(name)
    assert "corpus somebody/tales:story, n_blocks 4" in card.text
    assert '-p corpus "somebody/tales:story"' in card.text

    folder = str(tmp_path / "model")
    found = ask(hub, tmp_path / "home", models=["somebody/pruned"], pushes={"somebody/other": folder})
    is_a_sentence(found["somebody/pruned"], "hf auth login")  # private
    is_a_sentence(found["somebody/other"], "hf auth login")
    pushes = {"google/pruned": folder, "no/such/name": folder}
    found = ask(hub, tmp_path / "home", token=TOKEN, models=["somebody/pruned"], pushes=pushes)
    assert found["somebody/pruned"] == "LlamaForCausalLM"
    is_a_sentence(found["google/pruned"], "don't have the rights", "google")
    is_a_sentence(found["no/such/name"], "no/such/name", "namespace/repo_name")
    assert not {"models/somebody/other", "models/google/pruned"} & set(hub.repositories)

    words = ("export", str(run), "adapter", "--adapter", "--push", "somebody/new")
    pftools(hub, tmp_path, *words, token=TOKEN)
    new = hub.repositories["models/somebody/new"]
    assert new.private and set(new.files) == {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "masks.safetensors"} <= set(new.files)


def pftools(hub, folder, *words, token=""):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from pftools.cli import main; main()", *words],
        env=hub.environment(folder / "home", token=token),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout

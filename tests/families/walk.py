"""`python -m tests.families.walk`: every check of every class, and the table `data/families.csv`.

It can be stopped, and goes on where it was: what is done lies in `.families.jsonl`; `--anew` begins again.
Parts are named: `--only LlamaForCausalLM gpt2`, `--checks prune disk`, `--part 1/3`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
import warnings
from logging import getLogger
from pathlib import Path

STORE = Path(".families.jsonl")
TABLE = Path(__file__).resolve().parents[2] / "data" / "families.csv"
# {column of the table: the checks that it sums up}
COLUMNS = {
    "prune": ("prune", "order"),
    "from_disk": ("disk", "stream", "export"),
    "adapt": ("adapt", "checkpointing"),
    "quantized_base": ("quantized",),
    "shared_beginnings": ("likelihoods", "greedy", "perplexity"),
}
_RANK = ("TRACEBACK", "WRONG", "refused", "plain", "upstream", "exact")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="classes or model types")
    parser.add_argument("--checks", nargs="*", default=[])
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts")
    parser.add_argument("--anew", action="store_true", help="forget what was done before")
    parser.add_argument("--store", type=Path, default=STORE)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    if options.anew:
        options.store.unlink(missing_ok=True)
    walk(options.only, options.checks, options.part, options.store)
    done = read(options.store)
    if not options.only and not options.checks:
        write_table(done)
    return summary(done)


def walk(only: list[str], checks: list[str], part: str, store: Path) -> None:
    """Run what is not done yet, one line of the store a check."""
    from transformers.utils import logging

    from tests.families import zoo
    from tests.families.checks import CHECKS, run

    logging.set_verbosity_error()
    getLogger("lm_eval").setLevel("ERROR")
    done = read(store)
    with store.open("a", encoding="utf-8") as file:
        for name, kind in part_of(zoo.built(), part).items():
            for check in checks or CHECKS:
                if (only and name not in only and kind not in only) or (name, check) in done:
                    continue
                started = time.perf_counter()
                outcome = run(CHECKS[check], kind)
                line = {
                    "class": name,
                    "kind": kind,
                    "check": check,
                    "status": outcome.status,
                    "says": outcome.says,
                }
                file.write(json.dumps({**line, "seconds": round(time.perf_counter() - started, 1)}) + "\n")
                file.flush()


def part_of(kinds: dict[str, str], part: str) -> dict[str, str]:
    """Every N-th class, from the K-th on."""
    k, n = (int(number) for number in part.split("/"))
    return dict(list(kinds.items())[k - 1 :: n])


def read(store: Path) -> dict[tuple[str, str], dict[str, str]]:
    """{(class, check): its line}"""
    lines = store.read_text(encoding="utf-8").splitlines() if store.exists() else []
    return {(line["class"], line["check"]): line for line in map(json.loads, lines)}


def write_table(done: dict[tuple[str, str], dict[str, str]]) -> None:
    """`data/families.csv`: a row a class; where checks of a column differ, the worst stands there. note: the
    first refusal."""
    from tests.families import zoo

    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "model_type", *COLUMNS, "note"])
        for name, kind in zoo.kinds().items():
            if name in zoo.NOT_BUILT:
                writer.writerow([name, kind, *["not built"] * len(COLUMNS), zoo.NOT_BUILT[name]])
                continue
            cells, note = [], ""
            for checks in COLUMNS.values():
                found = [done[name, check] for check in checks if (name, check) in done]
                worst = min(found, key=lambda line: _RANK.index(line["status"]), default=None)
                cells.append(worst["status"] if worst else "not run")
                if worst and worst["says"] and not note:
                    note = worst["says"]
            writer.writerow([name, kind, *cells, note])


def summary(done: dict[tuple[str, str], dict[str, str]]) -> int:
    """Print counts a check, and what is wrong; 1 if anything is."""
    from tests.families.checks import CHECKS

    bad = 0
    for check in CHECKS:
        counts: dict[str, int] = {}
        for (_, other), line in done.items():
            if other == check:
                counts[line["status"]] = counts.get(line["status"], 0) + 1
        print(
            f"{check:14}",
            "  ".join(f"{status} {counts[status]}" for status in reversed(_RANK) if status in counts),
        )
    for (name, check), line in done.items():
        if line["status"] in ("WRONG", "TRACEBACK"):
            bad += 1
            print(f"{line['status']} {check} {name}: {line['says']}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Evaluation: the log-likelihoods of lm-eval's HFLM, faster where questions share their examples.

    python benchmarks/evaluate.py speed      requests a second: 5-shot choices, MMLU (data root), zero-shot
    python benchmarks/evaluate.py equality   largest difference in fp32: MMLU, BBH, lm-eval's own tasks

How much can be won is the ratio of tokens read, printed beside: HFLM reads the examples with every question,
PrefixCachedLM once.
"""

from __future__ import annotations

import logging
import os
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from _harness import arguments, in_turns, report
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from pftools.corpora.data_root import data_root
from pftools.evaluate import PrefixCachedLM, questions
from pftools.evaluate.tasks import load_tasks
from pftools.models import load_model

BATCH = 16
SUBJECTS = ("anatomy", "astronomy", "management", "sociology")
WORDS = (
    "the of a in red blue house tree run walk green city river sun moon book paper stone light dark hand "
    "wind salt"
).split()


def few_shot_requests(
    tokenizer: Any, *, prefixes: int = 4, questions: int = 25, shared: int = 680, own: int = 75
) -> list[Instance]:
    """5-shot choices, as MMLU by subject: every question after one of four beginnings of about 680 tokens."""
    chooser = random.Random(0)
    requests = []
    for _ in range(prefixes):
        beginning = _text(chooser, tokenizer, shared)
        for _ in range(questions):
            context = f"{beginning}\n\n{_text(chooser, tokenizer, own - 5)}\nAnswer:"
            requests += [
                Instance("loglikelihood", {}, (context, f" {letter}"), len(requests)) for letter in "ABCD"
            ]
    return requests


def _text(chooser: random.Random, tokenizer: Any, tokens: int) -> str:
    words = [chooser.choice(WORDS) for _ in range(tokens)]
    return tokenizer.decode(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"][:tokens])


def task_requests(tasks: list[Any], limit: int) -> list[Instance]:
    """The first ``limit`` questions of each task, as requests."""
    requests = []
    for task in tasks:
        task.build_all_requests(limit=limit)
        requests += task.instances
    return requests


def mmlu_tasks() -> list[Any]:
    return load_tasks(["mmlu"])["mmlu"][0].get_all_tasks()


def speed(model: Any, tokenizer: Any, args: Any) -> None:
    """Requests a second, ours over HFLM's."""
    contests = {"synthetic 5-shot": few_shot_requests(tokenizer)}
    if data_root():
        chosen = [task for task in mmlu_tasks() if task.task_name.removeprefix("mmlu_") in SUBJECTS]
        contests["MMLU 5-shot, 4 subjects"] = task_requests(chosen, 25)
    contests["zero-shot (facts)"] = task_requests(load_tasks(["facts"])["facts"], 100)
    for name, requests in contests.items():
        settings = {"dtype": args.dtype, "batch": BATCH, "requests": len(requests), "rounds": args.rounds}
        measured = contest(model, tokenizer, requests, rounds=args.rounds, device=args.device)
        report(
            f"{name}, {args.dtype}",
            measured,
            script=__file__,
            device=args.device,
            store=args.store,
            settings=settings,
        )


def contest(
    model: Any, tokenizer: Any, requests: list[Instance], *, rounds: int, device: str
) -> dict[str, Any]:
    """The same requests through both, in turns."""
    ours = PrefixCachedLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, progress=False)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    for lm in (ours, theirs):  # warm: kernels, tokenizer
        lm.loglikelihood(requests[:4], disable_tqdm=True)
    found: dict[str, list[tuple[float, bool]]] = {}
    times = in_turns(
        {
            "HFLM": lambda: found.update(theirs=theirs.loglikelihood(requests, disable_tqdm=True)),
            "PrefixCachedLM": lambda: found.update(ours=ours.loglikelihood(requests, disable_tqdm=True)),
        },
        rounds=rounds,
        device=device,
    )
    return {
        "ratio of requests a second": round(times["HFLM"] / times["PrefixCachedLM"], 2),
        "ratio of tokens read": round(ours.tokens_asked / ours.tokens_read, 2),
        **{f"requests a second, {kind}": round(len(requests) / taken, 1) for kind, taken in times.items()},
        **spread(found["ours"], found["theirs"]),
    }


def equality(model: Any, tokenizer: Any, args: Any) -> None:
    """Largest difference of a log-likelihood, and the accuracies, on the same questions."""
    root = data_root()
    if root is None:
        raise SystemExit("set PFTOOLS_DATA to a data root that has mmlu and bbh")
    cases = {
        "BBH logical deduction, 3-shot": (
            load_tasks(["bbh_logical_deduction_five_objects"])["bbh_logical_deduction_five_objects"],
            10,
        ),
        "lm-eval's leaderboard_bbh_logical_deduction_three_objects": (
            shipped(
                "leaderboard/bbh_mc",
                "leaderboard_bbh_logical_deduction_three_objects",
                {"test": "root:bbh/logical_deduction_three_objects/test"},
            ),
            10,
        ),
        "lm-eval's leaderboard_bbh_logical_deduction_seven_objects": (
            shipped(
                "leaderboard/bbh_mc",
                "leaderboard_bbh_logical_deduction_seven_objects",
                {"test": "root:bbh/logical_deduction_seven_objects/test"},
            ),
            10,
        ),
        "MMLU 5-shot, 57 subjects": (mmlu_tasks(), args.limit),
    }
    for name, (tasks, limit) in cases.items():
        if args.only not in name:
            continue
        scores, values = {}, {}
        for kind, lm in (
            (
                "HFLM",
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
            ),  # small: its logits of a long prompt fill the memory
            ("PrefixCachedLM", PrefixCachedLM(pretrained=model, tokenizer=tokenizer, progress=False)),
        ):
            found = lm_eval.evaluate(
                lm, TaskManager(include_defaults=False).load(tasks), limit=limit, bootstrap_iters=0
            )
            values[kind] = likelihoods(found)
            scores[kind] = np.mean(
                [
                    value
                    for task in found["results"].values()
                    for key, value in task.items()
                    if key in ("acc,none", "acc_norm,none")
                ]
            )
        measured = {
            **spread(values["PrefixCachedLM"], values["HFLM"]),
            "score": {kind: float(score) for kind, score in scores.items()},
        }
        measured["log-likelihoods compared"] = len(values["HFLM"])
        settings = {"dtype": args.dtype, "limit": limit, "batch": 2}
        report(
            f"equality, {name}, {args.dtype}",
            measured,
            script=__file__,
            device=args.device,
            store=args.store,
            settings=settings,
        )


def shipped(folder: str, name: str, files: dict[str, str]) -> list[Any]:
    """A task as lm-eval ships it, on rows of the data root."""
    manager = TaskManager(
        include_path=str(Path(lm_eval.__file__).parent / "tasks" / folder), include_defaults=False
    )
    changes = {"custom_dataset": questions.splits, "metadata": {"files": files}}
    return list(manager.load({"group": "shipped", "task": [{"task": name, **changes}]})["tasks"].values())


def likelihoods(found: dict[str, Any]) -> list[tuple[float, bool]]:
    """Every log-likelihood of a result, in lm-eval's order."""
    values = []
    for samples in found["samples"].values():
        for sample in samples:
            for response in sample["resps"]:
                value = response[0]
                values.append(tuple(value) if isinstance(value, (tuple, list)) else (float(value), False))
    return values


def spread(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> dict[str, Any]:
    """How far two lists of log-likelihoods are apart."""
    apart = np.abs(np.array([a for a, _ in ours]) - np.array([b for b, _ in theirs]))
    return {
        "largest difference of a log-likelihood": float(f"{apart.max():.2g}"),
        "median difference": float(f"{np.median(apart):.2g}"),
        "greedy marks that differ": sum(a != b for (_, a), (_, b) in zip(ours, theirs)),
    }


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="*", default=["speed", "equality"], choices=["speed", "equality"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", help="default: bfloat16 for speed, float32 for equality")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=5, help="questions a subject of MMLU, in equality")
    parser.add_argument("--only", default="", help="in equality: the cases whose name holds this")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_grad_enabled(False)
    for claim in args.claims:
        chosen = args.dtype or {"speed": "bfloat16", "equality": "float32"}[claim]
        network, words = load_model(args.model, dtype=chosen, device=args.device)
        measure = {"speed": speed, "equality": equality}[claim]
        measure(network, words, Namespace(**{**vars(args), "dtype": chosen}))

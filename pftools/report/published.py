"""The published numbers, for hollow marks beside one's own. They take part in no test."""

from __future__ import annotations

import pandas as pd

from pftools.shipped import DATA

STUDY = "Prune-Finetune-LLM, LLaMA-7B"
WANDA = "Wanda's paper, LLaMA-2-7B"
# {metric of the file: (the tasks of ours that ask the same, how it was measured)}.
_METRICS = {
    "wikitext2_ppl": (("perplexity",), "WikiText-2 test, blocks of 2,048 tokens"),
    "bbh_logical_deduction_five_objects": (
        ("bbh_logical_deduction_five_objects", "bbh_logical_deduction_five_objects_published"),
        "245 questions, no examples",
    ),
    "mmlu": (("mmlu", "mmlu_published"), "14,037 questions, 5 examples from the test split"),
    "belebele_eng": (("belebele_eng_Latn", "belebele_eng_Latn_published"), "895 questions, 5 examples"),
    "factoid_qa": (("freebaseqa", "freebaseqa_published"), "600 questions, right if the answer occurs"),
}


def published_numbers() -> pd.DataFrame:
    """The 36 rows of the study and Wanda's table for LLaMA-2-7B.

    Returns:
        source, ordering, asked, measured (shares), perplexity, and a column a metric of the study's file, its
        accuracies as shares.
    """
    study = pd.read_csv(DATA / "published" / "prune_finetune_llm_llama7b.csv")
    accuracies = {name: study[name] / 100 for name in _METRICS if name != "wikitext2_ppl"}
    ours = pd.DataFrame(
        {
            "source": STUDY,
            "ordering": study["pipeline"],
            "asked": study["sparsity_requested"],
            "measured": study["sparsity_measured"],
            "perplexity": study["wikitext2_ppl"],
            **accuracies,
        }
    )
    wanda = pd.read_csv(DATA / "published" / "wanda_llama2_wikitext2_ppl.csv")
    told = wanda["method"] + wanda["pattern"].map({"unstructured": "", "dense": ""}).fillna(
        " " + wanda["pattern"]
    )
    theirs = pd.DataFrame(
        {
            "source": WANDA + ", " + told,
            "ordering": ["base" if method == "dense" else "prune" for method in wanda["method"]],
            "asked": wanda["sparsity"],
            "measured": wanda["sparsity"],
            "perplexity": wanda["llama2_7b"],
        }
    )
    return pd.concat([ours, theirs], ignore_index=True)


def beside(metric: str, corpus: str = "") -> tuple[pd.DataFrame, str] | None:
    """The published numbers that belong beside a metric of ours, in a column of its name, and their protocol.

    Args:
        metric: "perplexity" or a task.
        corpus: for perplexity: the text that ours was measured on; only the same text belongs beside it.
    """
    for name, (tasks, protocol) in _METRICS.items():
        if metric in tasks and (metric != "perplexity" or corpus == "wikitext2"):
            numbers = published_numbers()
            column = "perplexity" if metric == "perplexity" else name
            kept = numbers[["source", "ordering", "asked", "measured"]].assign(**{metric: numbers[column]})
            return kept.dropna(subset=[metric]), protocol
    return None


def lost_zeros() -> str:
    """Where the published study lost sparsity, in a sentence: the most of each ordering that lost any."""
    numbers = published_numbers()
    numbers = numbers[numbers["source"] == STUDY]
    lost = numbers[numbers["asked"] - numbers["measured"] > 0.005]
    half = lost[lost["asked"] == 0.5]
    told = [f"{row.ordering} asked {row.asked:.0%} and has {row.measured:.0%}" for row in half.itertuples()]
    kept = sorted(set(numbers["ordering"]) - set(lost["ordering"]) - {"finetune"})
    return (
        f"In the published study {' and '.join(told)}: a dense merge of the adapter fills zeros. "
        f"{', '.join(kept)} lost none."
    )

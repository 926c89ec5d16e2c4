"""pftools: in which order should a language model be pruned and fine-tuned, and is the difference real?

The helper package behind the notebooks. A module is one idea; a module imports only from floors below it:

    cli                                    the command line
    study, report, widgets                 plan a study, render it, steer it by hand
    executors, slurm                       execute its steps, here or on a cluster
    figures, compare, weights              altair charts; paired statistics; weight analysis
    prune, finetune, evaluate              the three steps
    checkpoints, corpora, models           what steps read and write
    orderings, runs, settings, errors      words of P and F; run folders; validated parameters
    data_root, contents                    local data sets for machines without a hub; digests of inputs

Importing pftools imports nothing heavy: torch and its friends come with the module that needs them.
"""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes, which reports on every start that a fast path of its own is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Part of every run's key. Raise it when a change to the code changes the numbers that a step computes, so that
# runs of the older code are never mistaken for runs of this one.
RECIPE_VERSION = 3

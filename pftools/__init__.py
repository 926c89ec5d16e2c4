"""pftools: in which order should a language model be pruned and fine-tuned, and is the difference real?

The helper package behind the notebooks. A module is one idea, and imports only from the floors below its own
(import-linter checks that; the list with every module is in pyproject.toml):

    cli, doctor                        commands
    report, widgets                    render a study, steer it by hand
    study                              run a plan, read its results
    local, slurm                       execute many steps, here or on a cluster
    steps, progress                    execute one; say how far a plan is
    costs, plan, study_file            disk and time of a plan; the graph of steps; the YAML
    figures, compare, weights          charts; paired statistics; weight analysis
    models, checkpoints                a model by any name; base plus deltas, replayed
    prune, finetune, evaluate          the three steps
    adapters, base_models, corpora     an adapter and its merge; models and texts by name
    data_root, layers, masks           data sets as files; a decoder's anatomy; packed masks
    notebook                           what a notebook does first
    run_folder, orderings              run folders; words of P and F
    redaction                          secrets stay out of what is kept
    settings, contents, files, errors  validated parameters; digests; atomic writes
    cells                              what the source of a notebook's cell sets

Importing pftools imports nothing heavy: torch and its friends come with the module that needs them.
"""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes, which reports on every start that a fast path of its own is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Part of every run's key. Raise it when a change to the code changes the numbers that a step computes, so
# that runs of the older code are never mistaken for runs of this one.
RECIPE_VERSION = 3

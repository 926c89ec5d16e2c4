"""pftools: in which order should a language model be pruned and fine-tuned, and is the difference real?

The helper package behind the notebooks. A module is one idea, and imports only from the floors below its own
(import-linter checks that; the list with every module is in pyproject.toml):

    cli, doctor                             commands
    report, widgets                         render a study, steer it by hand
    choosers                                widgets that are pictures where there is no kernel
    execute                                 the steps of a plan, here or on a cluster
    study                                   its file, its plan, its costs, its results
    figures, compare, inference             charts; results beside each other; the statistics under them
    weights                                 weight analysis
    models                                  a model by any name
    notebook, inputs                        what a notebook does first; what a step reads, by digests
    checkpoints                             a base plus deltas, replayed or exported
    prune, finetune, evaluate               the three steps
    needs                                   what a step needs of memory, GPU and disk, before it starts
    pretrained                              a model by its name or from its files, loaded or only read
    corpora                                 texts by name, as blocks of tokens
    adapters, causal                        an adapter and its merge; whether a model reads from left to right
    layers, masks, dithering                a decoder's anatomy; packed masks; casts that keep small updates
    mapped                                  weights in a file that is mapped into memory
    bars                                    progress inside of a step
    run_folder, orderings                   run folders; words of P and F
    redaction, settings                     secrets stay out of what is kept; validated parameters
    criteria                                how much a weight matters
    contents, files, shipped, records       digests; atomic writes; what comes along; files of text and rows
    cells, colab, hub                       what a cell sets; Colab; what the hub says when it gives nothing
    memory, errors                          what runs out; errors in one sentence

Importing pftools imports nothing heavy: torch and its friends come with the module that needs them.
"""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes, which reports on every start that a fast path of its own is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Part of every run's key. Raise it when a change to the code changes the numbers that a step computes, so
# that runs of the older code are never mistaken for runs of this one.
RECIPE_VERSION = 3

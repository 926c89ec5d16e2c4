"""pftools: in which order should a language model be pruned and fine-tuned, and is the difference real?

The helper package behind the notebooks. A module is one idea, and imports only from the floors below its own
(import-linter checks that; the list with every module is in pyproject.toml):

    cli, doctor                             commands
    report, widgets                         render a study, steer it by hand
    choosers                                widgets that are pictures where there is no kernel
    study                                   run a plan, read its results
    local, slurm                            execute many steps, here or on a cluster
    steps, progress                         execute one; say how far a plan is
    checks                                  what can be known of a plan before its first step
    costs                                   disk and time of a plan
    plan, study_file                        the graph of steps; the YAML
    figures, compare, inference             charts; results beside each other; the statistics under them
    other_results, weights                  other programs' results; weight analysis
    models, timing                          a model by any name; its speed here
    notebook, inputs                        what a notebook does first; what a step reads, by digests
    checkpoints, reload_check               base plus deltas, replayed; would they give what was measured
    prune, finetune, evaluate               the three steps
    needs                                   what a step needs of memory, GPU and disk, before it starts
    adapters, base_models, model_files      an adapter and its merge; models by name, loaded or only read
    corpora, pydocs, data_root              texts by name; data sets as files
    layers, masks, dithering                a decoder's anatomy; packed masks; casts that keep small updates
    bars                                    progress inside of a step
    run_folder, orderings                   run folders; words of P and F
    redaction, settings                     secrets stay out of what is kept; validated parameters
    criteria                                how much a weight matters
    contents, files, shipped, cells, colab  digests; atomic writes; what comes along; what a cell sets; Colab
    yaml_file, records, chat, splits        files with their lines; documents; conversations; splits
    errors                                  errors in one sentence

Importing pftools imports nothing heavy: torch and its friends come with the module that needs them.
"""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes, which reports on every start that a fast path of its own is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Part of every run's key. Raise it when a change to the code changes the numbers that a step computes, so
# that runs of the older code are never mistaken for runs of this one.
RECIPE_VERSION = 3

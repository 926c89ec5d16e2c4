"""Execute the steps of a plan: `study.run_study`.

executors    the whole plan, stage after stage: here, or on a cluster
local        processes of this machine, several at a time
slurm        jobs of a cluster, the whole graph submitted at once
sbatch       what a job is asked for: memory, time, and the options that were given
slurm_queue  which jobs make which runs
steps        one step: its notebook, in a process with a kernel
progress     how far the plan is, in a terminal or a log
"""

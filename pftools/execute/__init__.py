"""Execute the steps of a plan: `study.run_study`.

executors  the whole plan, stage after stage: here, or on a cluster
local      processes of this machine, several at a time
slurm      jobs of a cluster, the whole graph submitted at once
steps      one step: its notebook, in a process with a kernel
progress   how far the plan is, in a terminal or a log
"""

"""Many experiments: their list, their states, and engines that run them.

matrix   the experiments as data: axes, filters, files of argument sets
state    the state of an experiment, from files only
table    what progress and plan print
lease    the record of a running suite
run      one suite on this machine
local    its engine: workers and what each does next
worker   one process that keeps a model loaded
cluster  a job array of a SLURM cluster, each task of which is such a suite
"""

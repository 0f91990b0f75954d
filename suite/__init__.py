"""Many experiments: which there are, where each stands, and running them.

matrix   the experiments as data: axes, filters, files of argument sets
state    where an experiment stands, read from files only; tally: what its sample store holds, counted cheaply
claims   which suite is running which experiments, on this or another node
run      a whole run on this machine; local: its workers; worker: one process that keeps a model loaded
cluster  an array job of a SLURM cluster, each task of which is such a run
table    what a person sees
"""

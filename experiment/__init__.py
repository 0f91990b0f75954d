"""One experiment, from its command line to its result file.

arguments, resolve   what was asked; identity: what identifies its inputs
checks               everything that can be wrong with the inputs, found before anything heavy loads
generation           the samples of a run; sample_cache, store: where they are kept
sample, text         the shapes of a sample; the text of an answer
lmeval, predictions  lm-eval's evaluator, called quietly; answers that were made elsewhere
result               the result file; statistics, diagnostics, code_scores: what it reports
workers, signals     the processes of a run, and how it ends early; progress: the bar
"""

"""What one experiment needs around model, decoding and benchmark.

checks   everything that can be wrong with its inputs, found before anything heavy loads
workers  the processes that share it; ledger: which samples are known, and where they are kept
lmeval   lm-eval's evaluator, called quietly; stops: where an answer is cut
result   the record of a sample and the result file; statistics, diagnostics: what is computed from them
progress the bar; signals: how a run ends early
"""

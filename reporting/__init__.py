"""From finished result files to what a person reads: tables, comparisons, AUP, plots, one HTML page.

Reads result files and nothing else; no torch, no lm-eval.
"""

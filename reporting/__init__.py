"""Tables, comparisons, AUP, figures and one HTML page, made from finished result files.

Reads result files only. Imports neither torch nor lm-eval.
"""

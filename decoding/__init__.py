"""Decoding of masked-diffusion language models: options, schedules, algorithms, and the engine.

`config`, `schedule` and `algorithms` import no torch, so a command line can be checked before
anything heavy loads. `engine` has the decoding loop. The package knows no task, no text and no
checkpoint.
"""

"""Decoding of masked-diffusion language models: schedules, algorithms, the engine.

`schedule` and `algorithms` import no torch, so that a command line can be checked before anything heavy loads;
`engine.decode` is the loop. Nothing here knows a task, a text or a checkpoint format.
"""

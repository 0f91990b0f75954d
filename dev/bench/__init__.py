"""Measure the speed of the engine against the official loops, on the same weights and prompts."""

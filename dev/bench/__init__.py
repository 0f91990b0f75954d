"""Speed, measured: the official loops written plainly against the engine, same weights, same prompts, in turns."""

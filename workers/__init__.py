"""A pipeline stage: its books of the requests it runs, the model engine, the sampler."""

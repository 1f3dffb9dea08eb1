"""A transformers causal LM as the losses see it: its head, and what is added to it."""

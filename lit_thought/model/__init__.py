"""A causal LM as blocks and sites: loading it, its linear layers, and where in each block a and δ are read."""

"""Pairs and texts become prompts with a removable chunk, token ids of both runs, and aligned, padded batches."""

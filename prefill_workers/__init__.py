"""Compute KV: the prefill role, which prefills prompts and leaves their chunks in the store."""

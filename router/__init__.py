"""Decide: HTTP ingress, segments of a prompt, the directory of chunks, placement."""

"""Joins: chunks that were learned elsewhere, moved to their place and made to fit what stands before them.

Covers: moving keys (`rotation`), which tokens are recomputed (`selection`), scores for that choice (`probe`),
recomputing them through the engine's own model (`forward`), one join from start to end (`run`).
Does not cover: what is loaded (`kvstore.engine.loader`), what may be joined (`router.policy`).
"""

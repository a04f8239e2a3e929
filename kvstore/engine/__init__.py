"""The only code that touches vLLM's KV: the connector, paged gather and scatter, building engines.

Covers: see the modules; `kvstore.engine.connector` is the way in. Does not cover: stores, plans, HTTP.
"""

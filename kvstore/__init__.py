"""Keep KV and move it: keys, container, codecs, tiers, the node store and its client, events."""

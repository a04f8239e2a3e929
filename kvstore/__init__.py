"""Keep KV and move it: keys, container, codecs, tiers, transport, the node store and its client, events."""

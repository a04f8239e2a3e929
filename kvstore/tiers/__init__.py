"""Where records live on one node: a shared-memory arena, and files below it."""

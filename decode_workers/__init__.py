"""Generate: the decode role, which carries out a plan, loads chunks and streams tokens."""

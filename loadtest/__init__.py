"""Prove it: benchmarks, workloads, traces and reports."""

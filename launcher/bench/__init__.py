"""Benchmark sweeps: many runs from one file, predicted beside measured."""

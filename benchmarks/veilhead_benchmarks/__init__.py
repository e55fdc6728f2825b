"""Benchmarks, the first against what a user would pick instead, and the demo."""

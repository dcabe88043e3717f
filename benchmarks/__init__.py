"""Benchmarks of this project: one script for each claim about speed, memory or recall."""

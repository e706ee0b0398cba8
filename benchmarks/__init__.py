"""Benchmarks of karst-hub. Each module runs by itself and checks its results before it measures."""

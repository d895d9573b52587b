"""A run: its settings, its loop, its loss, its metrics."""

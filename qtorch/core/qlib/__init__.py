"""Qlib's names: what Qlib's classes and their arguments are here, and the translation of tasks."""

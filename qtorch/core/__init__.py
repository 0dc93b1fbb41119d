"""Foundations that every other package uses: errors, configuration, identity, trust, defaults."""

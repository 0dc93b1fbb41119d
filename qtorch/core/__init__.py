"""The floor under everything: errors, configuration, identity, trust, the process's defaults."""

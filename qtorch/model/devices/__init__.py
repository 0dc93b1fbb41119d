"""Training on several devices: rank processes, external launchers, sharding."""

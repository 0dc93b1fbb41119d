"""Child processes: fork server, stop signals, heartbeats, and what launchers say in variables."""

"""What the commands print: tables of runs and sweeps, of trials, of a pool's tasks."""

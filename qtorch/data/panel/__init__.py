"""The panel of bars or features `[D, N, F]`, its columns and views, and windows from it."""

"""`qtorch run`: workflow files in Qlib's format, as jobs of qtorch."""

"""Networks that look at each instrument's own window."""

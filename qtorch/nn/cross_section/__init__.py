"""Networks that look at all instruments of a day together."""

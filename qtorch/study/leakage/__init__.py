"""The probe for leaks of the future: `qtorch.study.probe` and its checks."""

"""One job of `qtorch train`, and the sweep command around many of them."""

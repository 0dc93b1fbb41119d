"""The one training loop on Lightning: module, loader, fit, checkpoints, callbacks."""

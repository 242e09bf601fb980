"""Data, arguments, callbacks and the command for training."""

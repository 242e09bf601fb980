"""Score trained models."""

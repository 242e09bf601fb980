"""Publishing: a model card, a staged copy that is tried without this package, and the upload."""

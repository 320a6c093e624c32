"""Loss terms of the training objective."""

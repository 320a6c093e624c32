"""Loss terms: small, named, and logged under that name."""

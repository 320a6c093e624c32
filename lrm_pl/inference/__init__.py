"""Everything that a trained model does: loading, reconstruction, export."""

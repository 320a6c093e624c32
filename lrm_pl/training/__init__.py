"""LightningModule, optimizer, strategies, checkpointing and validation of settings. See README.md."""

"""Training: LightningModule, optimizer, strategies, checkpointing and checks of settings. See README.md."""

"""How the network is trained: the LightningModule, the optimizer. Nothing here knows how images are shown."""

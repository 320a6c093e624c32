"""How the network is trained: the LightningModule, the optimizer. Nothing here knows how pictures are shown."""

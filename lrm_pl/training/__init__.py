"""How the network is trained: the LightningModule, the optimiser. Nothing here knows how pictures are shown."""

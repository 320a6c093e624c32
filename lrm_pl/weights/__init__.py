"""Functions that find, download, verify, read and convert pretrained weights from other projects."""

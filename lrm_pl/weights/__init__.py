"""Functions that find, download, verify, read and convert pretrained weights of other projects."""

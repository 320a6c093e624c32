"""Pretrained weights of other projects: find, download, verify, read and convert."""

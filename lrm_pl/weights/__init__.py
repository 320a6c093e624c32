"""Files in and out: pretrained weights of other projects, found, verified and read."""

"""The network: image + camera -> triplane -> field. Read ``lrm.py`` first. No training, no rendering here."""

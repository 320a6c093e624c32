"""The network, which maps an image and its camera to a triplane radiance field. Start with ``lrm.py``."""

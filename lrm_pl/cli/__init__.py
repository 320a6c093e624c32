"""Command line for training: ``LRMCLI``, the default config, and the report after a fit."""

"""Command line of training: ``LRMCLI``, its default config, and the report after a fit."""

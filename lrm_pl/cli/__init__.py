"""The command line of training: LightningCLI, its defaults and its reports."""

"""Checks of ``lrm doctor``. Each check is a function that returns one or more findings."""

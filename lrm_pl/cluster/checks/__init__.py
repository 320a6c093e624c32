"""Checks of ``lrm doctor``, by subject. Each check is a function that returns findings."""

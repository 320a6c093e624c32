"""Readers for folders of views that were rendered or recorded by other projects.

The readers return ``PosedViews`` in the conventions of ``lrm_pl.conventions``.
"""

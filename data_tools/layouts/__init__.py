"""Readers for folders of views that were rendered or recorded by other projects, with one module per layout.

The readers return ``PosedViews`` in the conventions of ``lrm_pl.conventions``.
"""

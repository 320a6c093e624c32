"""Readers of other projects' layouts of rendered or filmed views, one module per layout.

Each returns ``PosedViews`` in the conventions of ``lrm_pl.conventions``.
"""

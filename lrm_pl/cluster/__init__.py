"""Commands that start multi-process runs (``lrm launch``) and check their requirements (``lrm doctor``)."""

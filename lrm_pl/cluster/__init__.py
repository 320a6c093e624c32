"""Commands ``lrm launch`` and ``lrm doctor``, which start and check runs on several processes and nodes."""

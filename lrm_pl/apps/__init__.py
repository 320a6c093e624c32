"""Commands of ``lrm``: argument parsing and output; the work is done by the other packages."""

"""Commands of ``lrm``, which parse arguments, call the other packages and print results."""

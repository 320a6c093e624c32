"""Volume rendering. It knows a field only as something to query at points; ``volume.render`` is the entry."""

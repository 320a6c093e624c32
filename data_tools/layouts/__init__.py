"""How others lay out folders of views, one file each: ``find_objects(root)`` and ``read_object(folder)``.

Every convention that is not ours ends in these files.
"""

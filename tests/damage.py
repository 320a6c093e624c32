"""Damage that tests do to shards."""


def spoil_first_poses(tar):
    """Make the poses of a shard's first object no array any more; its size and its index stay."""
    content = bytearray(tar.read_bytes())
    place = content.index(b"\x93NUMPY")
    content[place : place + 6] = b"corrup"
    tar.write_bytes(bytes(content))

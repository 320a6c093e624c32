"""What the config asks for: pretrained weights, shards, and a batch that the processes divide."""

import hashlib

from lrm_pl.cluster.checks.finding import Finding
from lrm_pl.cluster.checks.wanted import Wanted, Weights
from lrm_pl.data.cache import CacheConfig
from lrm_pl.data.manifest import SPLITS
from lrm_pl.data.mixture import Mixture
from lrm_pl.errors import InputError, counted
from lrm_pl.weights.resolve import WeightsError, cached_path, candidates, find, is_available


def weights(wanted: Weights) -> Finding:
    """Say which source would give a file of weights, without downloading anything."""
    check = f"weights {wanted.name}"
    try:
        found = find(wanted.name, source=wanted.source, path=wanted.path, sha256=wanted.sha256)
    except WeightsError as error:
        return Finding.from_error(check, error)
    if found is not None:
        return Finding(check, f"{found.description}, {found.found_in} {found.path}")
    files = candidates(wanted.name, wanted.source)
    for file in files:
        if is_available(file):
            return Finding(check, f"not downloaded yet; available from the {file.source}")
    paths = " or ".join(str(cached_path(file)) for file in files)
    remedy = f"run a short `lrm fit` with network access and the same cache, or put the file at {paths}"
    sources = " and ".join(file.source for file in files)
    return Finding(check, f"not downloaded, and unavailable from {sources}", "missing", remedy)


def shards(wanted: Wanted) -> list[Finding]:
    """Read the manifest; compare objects and views with what the run takes."""
    try:
        mixture = Mixture(wanted.sets, CacheConfig(attempts=2))
        mixture.require_usable(wanted.bounds)
    except InputError as error:  # of the shards, or of the store that they are in
        return [Finding.from_error("shards", error)]
    except OSError as error:
        remedy = f"give this user the right to read {error.filename}"
        return [Finding("shards", f"{error.filename}: {error.strerror}", "missing", remedy)]
    digest = hashlib.sha256(repr([manifest for _, manifest, _ in mixture.members]).encode()).hexdigest()[:8]
    train, val = (
        sum(entry.shard.samples for entry in mixture.entries(split, repeated=split == "train"))
        for split in SPLITS
    )
    shards = sum(len(manifest.shards) for _, manifest, _ in mixture.members)
    found = f"{mixture.name}: {train} objects to train on, {val} held out, {shards} shards ({digest})"
    findings = [Finding("shards", found, alike=True)]
    if train < wanted.batch_size:
        remedy = f"a step takes {wanted.batch_size} objects: render more, or lower --data.batch_size"
        findings = [Finding("shards", found, "missing", remedy)]
    seen = f"{mixture.views} an object, {wanted.views} needed"
    if mixture.views < wanted.views:
        remedy = f"lower --data.side_views or --data.unseen_views, or: make render-shards VIEWS={wanted.views} OUT=..."
        return [*findings, Finding("views", seen, "missing", remedy)]
    return [*findings, Finding("views", seen)]


def batch(wanted: Wanted) -> Finding:
    """Compare the batch with the processes and accumulated batches that must divide it."""
    parts = wanted.nodes * wanted.processes * wanted.accumulate
    found = (
        f"{wanted.batch_size} objects over {counted(wanted.nodes, 'node')} x {counted(wanted.processes, 'process')} x "
        f"{wanted.accumulate} accumulated"
    )
    if wanted.batch_size % parts or wanted.batch_size < 1:
        above = -(-max(1, wanted.batch_size) // parts) * parts
        below = wanted.batch_size // parts * parts
        choice = f"{below} or {above}" if below > 0 else str(above)
        return Finding("batch", found, "missing", f"{parts} must divide it: --data.batch_size {choice}")
    return Finding("batch", f"{found}: {wanted.batch_size // parts} at a time")

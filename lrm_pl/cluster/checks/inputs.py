"""Checks of the pretrained weights, the shards and the batch size of a run."""

import hashlib

from lrm_pl.cluster.checks.findings import Finding
from lrm_pl.cluster.checks.requirements import RequiredWeights, RunRequirements
from lrm_pl.data.cache import CacheConfig
from lrm_pl.data.manifest import SPLITS
from lrm_pl.data.mixture import Mixture
from lrm_pl.data.stream import BatchPartition
from lrm_pl.errors import InputError, counted
from lrm_pl.weights.resolve import WeightsError, cached_path, find, is_available, list_weight_files


def weights(required: RequiredWeights) -> Finding:
    """Check whether a weight file exists or can be downloaded, without downloading it."""
    check = f"weights {required.name}"
    try:
        found = find(required.name, source=required.source, path=required.path, sha256=required.sha256)
    except WeightsError as error:
        return Finding.from_error(check, error)
    if found is not None:
        return Finding(check, f"{found.description}, {found.found_in} {found.path}")
    files = list_weight_files(required.name, required.source)
    for file in files:
        if is_available(file):
            return Finding(check, f"not downloaded yet; available from the {file.source}")
    paths = " or ".join(str(cached_path(file)) for file in files)
    remedy = f"run a short `lrm fit` with network access and the same cache, or put the file at {paths}"
    sources = " and ".join(file.source for file in files)
    return Finding(check, f"not downloaded, and unavailable from {sources}", "missing", remedy)


def shards(run: RunRequirements) -> list[Finding]:
    """Check that the shards contain as many objects and views as the run needs."""
    try:
        mixture = Mixture(run.sets, CacheConfig(attempts=2))
        mixture.require_usable(run.bounds)
    except InputError as error:
        return [Finding.from_error("shards", error)]
    except OSError as error:
        remedy = f"give this user read access to {error.filename}"
        return [Finding("shards", f"{error.filename}: {error.strerror}", "missing", remedy)]
    digest = hashlib.sha256(repr([manifest for _, manifest, _ in mixture.members]).encode()).hexdigest()[:8]
    train, val = (
        sum(entry.shard.samples for entry in mixture.entries(split, repeated=split == "train"))
        for split in SPLITS
    )
    shards = sum(len(manifest.shards) for _, manifest, _ in mixture.members)
    found = f"{mixture.name}: {train} training objects, {val} held out, {shards} shards ({digest})"
    findings = [Finding("shards", found, uniform=True)]
    if train < run.batch_size:
        remedy = f"a step needs {run.batch_size} objects: render more, or lower --data.batch_size"
        findings = [Finding("shards", found, "missing", remedy)]
    views = f"{mixture.views} per object, {run.views} needed"
    if mixture.views < run.views:
        remedy = f"lower --data.side_views or --data.unseen_views, or: make render-shards VIEWS={run.views} OUT=..."
        return [*findings, Finding("views", views, "missing", remedy)]
    return [*findings, Finding("views", views)]


def batch(run: RunRequirements) -> Finding:
    """Check that the batch size is divisible by the number of processes times the number of accumulated batches."""
    found = (
        f"{run.batch_size} objects over {counted(run.nodes, 'node')} x {counted(run.processes, 'process')} x "
        f"{run.accumulate} accumulated"
    )
    try:
        partition = BatchPartition(run.batch_size, world=run.nodes * run.processes, accumulate=run.accumulate)
    except InputError as error:
        return Finding("batch", found, "missing", error.remedy)
    return Finding("batch", f"{found}: {partition.local_batch_size} at a time")

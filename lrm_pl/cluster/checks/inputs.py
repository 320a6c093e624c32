"""Checks of the pretrained weights, the shards and the batch size of a run."""

import hashlib

from lrm_pl.cli.weights import WeightsFile
from lrm_pl.cluster.checks.findings import Finding
from lrm_pl.cluster.checks.requirements import RunRequirements
from lrm_pl.data.cache import CacheConfig
from lrm_pl.data.manifest import SPLITS
from lrm_pl.data.mixture import Mixture
from lrm_pl.data.stream import BatchPartition
from lrm_pl.errors import InputError, counted
from lrm_pl.weights import resolve
from lrm_pl.weights.catalog import WeightName


def weights(name: WeightName, file: WeightsFile, source: resolve.WeightSource) -> Finding:
    """Check whether a weight file exists or can be downloaded, without downloading it."""
    check = f"weights {name}"
    try:
        found = resolve.find(name, source=source, **vars(file))
    except resolve.WeightsError as error:
        return Finding.from_error(check, error)
    if found is not None:
        return Finding(check, f"{found.description}, {found.found_in} {found.path}")
    offers = resolve.list_weight_files(name, source)
    for offer in offers:
        if resolve.is_available(offer):
            return Finding(check, f"not downloaded yet; available from the {offer.source}")
    paths = " or ".join(str(resolve.cached_path(offer)) for offer in offers)
    sources = " and ".join(offer.source for offer in offers)
    return Finding(
        check,
        f"not downloaded, and unavailable from {sources}",
        missing=f"run a short `lrm fit` with network access and the same cache, or put the file at {paths}",
    )


def shards(run: RunRequirements) -> list[Finding]:
    """Check that the shards contain as many objects and views as the run needs."""
    try:
        mixture = Mixture(run.sets, CacheConfig(attempts=2))
        mixture.require_usable(run.bounds)
    except InputError as error:
        return [Finding.from_error("shards", error)]
    except OSError as error:
        remedy = f"give this user read access to {error.filename}"
        return [Finding("shards", f"{error.filename}: {error.strerror}", remedy)]
    digest = hashlib.sha256(repr([manifest for _, manifest, _ in mixture.members]).encode()).hexdigest()[:8]
    train, val = (
        sum(entry.shard.samples for entry in mixture.entries(split, repeated=split == "train"))
        for split in SPLITS
    )
    shards = sum(len(manifest.shards) for _, manifest, _ in mixture.members)
    found = f"{mixture.name}: {train} training objects, {val} held out, {shards} shards ({digest})"
    few = f"render at least {run.batch_size} training objects for a step, or lower --data.batch_size"
    narrow = (
        f"lower --data.side_views or --data.unseen_views, or run make render-shards VIEWS={run.views} OUT=..."
    )
    return [
        Finding("shards", found, missing=few if train < run.batch_size else "", uniform=True),
        Finding(
            "views",
            f"{mixture.views} per object; {run.views} required",
            missing=narrow if mixture.views < run.views else "",
        ),
    ]


def batch(run: RunRequirements) -> Finding:
    """Check that the batch size is divisible by the number of processes times the number of accumulated batches."""
    found = (
        f"{run.batch_size} objects over {counted(run.nodes, 'node')} x {counted(run.processes, 'process')} x "
        f"{run.accumulate} accumulated"
    )
    try:
        partition = BatchPartition(run.batch_size, world=run.nodes * run.processes, accumulate=run.accumulate)
    except InputError as error:
        return Finding("batch", found, error.remedy)
    return Finding("batch", f"{found}: {partition.local_batch_size} at a time")

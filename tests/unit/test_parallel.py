"""Tests that activation checkpointing and compilation do not change outputs and gradients."""

import pytest
import torch

from lrm_pl.errors import InputError
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.lrm import LRM
from lrm_pl.training.parallelize import ParallelConfig, network_blocks, prepare_blocks


def lrm():
    torch.manual_seed(0)
    return LRM(
        ImageEncoder("test_vit", image_size=32, frozen=False),
        NeRFDecoder(channels=4, width=8, layers=3),
        dim=16, depth=4, heads=2, camera_dim=8, plane_tokens=4,
    )  # fmt: skip


def step(network):
    """Run the forward and backward passes, and return the planes and all gradients by name."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 1, 3, 32, 32, generator=generator)
    c2w, fxfycxcy = torch.eye(4).expand(2, 1, 4, 4), torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(2, 1, 4)
    planes = network(images, c2w, fxfycxcy).planes
    planes.square().mean().backward()
    return planes.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def count_runs(network):
    """Count how often each block's attention is computed."""
    runs = [0] * len(network_blocks(network))
    for number, block in enumerate(network_blocks(network)):
        attention = next(
            m for name, m in block.named_modules() if name.endswith("attn") or "attention" in name
        )

        def hook(*_, number=number):
            runs[number] += 1

        attention.register_forward_pre_hook(hook)
    return runs


def same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], gradient, **tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_every_nth_block_does_not_change_gradients(every):
    network = lrm()
    prepare_blocks(network, ParallelConfig(activation_checkpointing_every=every))
    runs = count_runs(network)
    same(step(network), step(lrm()), rtol=0, atol=0)
    blocks = range(1, len(runs) + 1)
    assert runs == [2 if number % every == 0 else 1 for number in blocks]


def test_frozen_blocks_are_not_recomputed():
    network = lrm()
    network.encoder.requires_grad_(False)
    prepare_blocks(network, ParallelConfig(activation_checkpointing_every=1))
    runs = count_runs(network)
    step(network)
    encoder = len(network.encoder.vit.blocks)
    assert runs == [1] * encoder + [2] * (len(runs) - encoder)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo looks at it itself
def test_compiled_blocks_match_uncompiled_blocks():
    torch._dynamo.reset()
    network = lrm()
    names = set(network.state_dict())
    prepare_blocks(network, ParallelConfig(activation_checkpointing_every=2, compile=True))
    torch._dynamo.utils.counters.clear()
    ours = step(network)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "blocks were compiled"
    same(ours, step(lrm()), rtol=1e-4, atol=1e-6)
    assert set(network.state_dict()) == names, "a checkpoint does not depend on it"


def test_a_negative_number_of_blocks_is_an_error():
    with pytest.raises(
        InputError, match="expected activation_checkpointing_every of 0 or more, but found -1"
    ):
        ParallelConfig(activation_checkpointing_every=-1)


def test_recomputed_mlps_save_only_their_input_and_do_not_change_gradients():
    def held(config):
        network, kept = lrm(), []
        prepare_blocks(network, config)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            outcome = step(network)
        hidden = [x for x in kept if x.shape[-1] == 4 * 16 and x.numel() == 2 * (3 * 4 * 4) * (4 * 16)]
        return outcome, len(hidden), len(network.transformer.blocks)

    plain, many, blocks = held(ParallelConfig())
    recomputed, few, _ = held(ParallelConfig(recompute_mlp=True))
    same(recomputed, plain, rtol=0, atol=0)
    assert many >= 2 * blocks, "before and after the GELU"
    assert few == 0

"""Random weights for parity tests, and networks built from conversions."""

import torch

from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.lrm import LRM
from lrm_pl.rendering.renderer import Renderer


def randomized(network, seed):
    """Set all parameters, including norms and biases, to significant random values with visible densities."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            spread = fan**-0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0, spread, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter += 1
            if name in ("pos_embed", "tokenizer.embeddings"):
                parameter /= spread
            if name.startswith(("synthesizer.decoder.net.6", "decoder.layers.18")):
                parameter *= 4
                if name.endswith("bias"):
                    parameter[0] = 3.0
    return network.eval()


def built(conversion):
    """Build the network and renderer from a conversion and load the weights strictly."""
    section = dict(conversion.model["lrm"])
    encoder, decoder = ImageEncoder(**section.pop("encoder")), NeRFDecoder(**section.pop("decoder"))
    network = LRM(encoder, decoder, **section)
    network.load_state_dict(conversion.weights, strict=True)
    return network.eval(), Renderer(**conversion.model["renderer"])

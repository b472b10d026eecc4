"""Inference of the reference generators in a CUDA graph."""

from dataclasses import replace

import pytest
import torch
from support import assert_message
from unit_run import unit_config

from dpsims.errors import InputError
from dpsims_reference.cuda_graph import CapturedGenerator
from dpsims_reference.generator import build_generator
from dpsims_reference.presets import preset

CPU = torch.device("cpu")


def built(config, device):
    torch.manual_seed(0)
    generator = build_generator(config)
    for name, parameter in generator.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return generator.to(device, memory_format=torch.channels_last).eval()


def drawn(config, batch, seed, device):
    rng = torch.Generator(device).manual_seed(seed)
    size = (batch, *config.data.image_size)
    labels = torch.randint(config.data.num_classes, size, generator=rng, device=device)
    return labels, torch.randn(batch, config.generator.latent_dim, generator=rng, device=device)


def configs():
    tiny = preset("tiny")
    normed = replace(tiny.generator, spectral_norm=True, spade_hidden=16)
    oasis = replace(unit_config().generator, architecture="oasis")
    return {
        "tiny": tiny,
        "spectral-norm": replace(tiny, generator=normed),
        "oasis": replace(unit_config(), generator=oasis),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(configs()))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_replay_equals_eager_and_never_waits(name, autocast, batch):
    config, cuda = configs()[name], torch.device("cuda")
    generator = built(config, cuda)
    captured = CapturedGenerator(generator, *drawn(config, batch, 0, cuda), autocast=autocast)
    for seed in (1, 2):
        inputs = drawn(config, batch, seed, cuda)
        enabled = autocast is not None
        with torch.no_grad(), torch.autocast("cuda", autocast, enabled=enabled):
            wanted = generator(*inputs).images
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            images = captured(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # the very same kernels, but for what a library picks anew
        gap = (images - wanted).abs().max() / wanted.abs().max()
        assert gap.item() <= (2**-6 if enabled else 1e-3)


@pytest.mark.gpu
def test_weights_that_change_in_place_count_and_inputs_stay_checked():
    config, cuda = preset("tiny"), torch.device("cuda")
    generator = built(config, cuda)
    inputs = drawn(config, 2, 0, cuda)
    captured = CapturedGenerator(generator, *inputs)
    before = captured(*inputs).clone()
    with torch.no_grad():
        generator.to_rgb.bias.add_(1.0)
    assert torch.allclose(captured(*inputs), before + 1, atol=1e-5)
    with pytest.raises(InputError) as caught:
        captured(*drawn(config, 3, 0, cuda))
    assert_message(caught.value, "CapturedGenerator: labels must be as recorded", "(3, 64, 64)")


def test_a_generator_on_the_cpu_is_refused():
    config = unit_config()
    with pytest.raises(InputError) as caught:
        CapturedGenerator(built(config, CPU), *drawn(config, 1, 0, CPU))
    assert_message(caught.value, "CapturedGenerator: generator must be on a CUDA device", "cpu")

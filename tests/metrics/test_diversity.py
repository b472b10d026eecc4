from __future__ import annotations

import hashlib
from itertools import combinations

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_file
from support import assert_equal, assert_message

from dpsims.errors import BackboneError, DTypeError, InputError
from dpsims.metrics import l1_distance, lpips_distance, pairwise_diversity

SIZES = st.tuples(st.integers(2, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


def random_samples(sizes, seed):
    count, batch, height, width = sizes
    generator = torch.Generator().manual_seed(seed)
    shape = (count, batch, 3, height, width)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


# pairs


@given(SIZES, st.integers(0, 2**31))
def test_equals_the_mean_over_all_pairs(sizes, seed):
    samples = random_samples(sizes, seed)
    flat = samples.flatten(2).numpy()
    expected = [
        sum(abs(flat[i, b] - flat[j, b]).mean() for i, j in combinations(range(sizes[0]), 2))
        / (sizes[0] * (sizes[0] - 1) / 2)
        for b in range(sizes[1])
    ]
    actual = pairwise_diversity(samples, l1_distance)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@given(SIZES, st.integers(0, 2**31))
def test_order_of_samples_does_not_matter_and_maps_are_independent(sizes, seed):
    samples = random_samples(sizes, seed)
    diversity = pairwise_diversity(samples, l1_distance)
    # another order of the same sum
    torch.testing.assert_close(pairwise_diversity(samples.flip(0), l1_distance), diversity)
    apart = [pairwise_diversity(samples[:, [b]], l1_distance) for b in range(sizes[1])]
    # the mean of a map is summed in an order that depends on how many there are
    torch.testing.assert_close(torch.cat(apart), diversity)


@given(SIZES, st.integers(0, 2**31))
def test_equal_samples_have_none_and_scaling_scales(sizes, seed):
    samples = random_samples(sizes, seed)
    equal = samples[:1].expand_as(samples)
    assert_equal(pairwise_diversity(equal, l1_distance), torch.zeros(sizes[1]).double())
    assert_equal(
        pairwise_diversity(samples / 2, l1_distance), pairwise_diversity(samples, l1_distance) / 2
    )


def test_gradients_reach_the_samples():
    samples = random_samples((3, 2, 2, 2), 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: pairwise_diversity(s, l1_distance), samples)


def test_empty_batch_gives_nothing():
    assert pairwise_diversity(torch.zeros(3, 0, 3, 2, 2), l1_distance).shape == (0,)


@pytest.mark.parametrize(
    ("samples", "distance", "error", "parts"),
    [
        (None, l1_distance, DTypeError, ["samples", "NoneType"]),
        (torch.zeros(2, 1, 3, 2, 2).long(), l1_distance, DTypeError, ["samples", "int64"]),
        (torch.zeros(2, 3, 2, 2), l1_distance, InputError, ["samples", "(S, B, C=3, H, W)"]),
        (torch.zeros(2, 1, 4, 2, 2), l1_distance, InputError, ["samples", "C=3"]),
        (torch.zeros(1, 1, 3, 2, 2), l1_distance, InputError, ["samples", "at least 2", "got 1"]),
        (torch.zeros(2, 1, 3, 2, 2), "lpips", DTypeError, ["distance", "callable", "str"]),
        (
            torch.zeros(2, 2, 3, 2, 2),
            lambda a, b: (a - b).abs().mean(),
            InputError,
            ["distance's result", "(B=2,)", "got ()"],
        ),
        (torch.zeros(2, 2, 3, 2, 2), lambda a, b: 0.0, DTypeError, ["distance's result", "float"]),
    ],
    ids=["none", "integers", "rank-4", "channels", "one-sample", "string", "scalar", "number"],
)
def test_pairs_refuse(samples, distance, error, parts):
    with pytest.raises(error) as caught:
        pairwise_diversity(samples, distance)
    assert_message(caught.value, "pairwise_diversity: ", *parts)


@given(SIZES, st.integers(0, 2**31))
def test_l1_is_symmetric_and_at_most_two(sizes, seed):
    a, b = random_samples(sizes, seed)[:2]
    distance = l1_distance(a, b)
    assert_equal(distance, l1_distance(b, a))
    assert ((distance >= 0) & (distance <= 2)).all()
    assert_equal(l1_distance(a, a), torch.zeros(sizes[1]).double())


def test_l1_refuses_what_would_broadcast():
    with pytest.raises(InputError) as caught:
        l1_distance(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    assert_message(caught.value, "l1_distance: images_b", "(1, 3, 4, 4) and (2, 3, 4, 4)")


# lpips, on a random trunk that the tests write to a file


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = squeezenet1_1(weights=None).state_dict()
    path = tmp_path_factory.mktemp("trunk") / "squeezenet.pth"
    torch.save(state, path)
    return path


def batches(size=64):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(2, 2, 3, size, size, generator=generator) * 2 - 1).unbind()


def test_lpips_uses_the_file_and_equals_the_package(trunk):
    import lpips

    distance = lpips_distance("squeeze", weights=trunk)
    with pytest.warns(UserWarning, match="deprecated"):
        reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    state = torch.load(trunk, weights_only=True)
    names = {key: f"features.{key.partition('.')[2]}" for key in reference.net.state_dict()}
    reference.net.load_state_dict({key: state[name] for key, name in names.items()})
    a, b = batches()
    assert_equal(distance(a, b), reference(a, b).flatten())
    assert distance(a, b).shape == (2,)


def test_lpips_is_a_distance_and_frozen(trunk):
    distance = lpips_distance("squeeze", weights=trunk).train()
    a, b = batches()
    assert not any(module.training for module in distance.model.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert_equal(distance(a, a), torch.zeros(2))
    torch.testing.assert_close(distance(a, b), distance(b, a))
    assert (distance(a, b) > 0).all()
    a.requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad.abs().sum() > 0


def test_lpips_reads_safetensors_and_leaves_global_state_alone(trunk, tmp_path, capsys):
    state = torch.get_rng_state()
    path = tmp_path / "squeezenet.safetensors"
    save_file(torch.load(trunk, weights_only=True), path)
    first, second = (lpips_distance("squeeze", weights=file) for file in (trunk, str(path)))
    assert_equal(torch.get_rng_state(), state)
    assert_equal(first(*batches()), second(*batches()))
    assert capsys.readouterr().out == ""


def test_lpips_works_as_a_distance_of_pairs(trunk):
    distance = lpips_distance("squeeze", weights=trunk)
    a, b = batches()
    diversity = pairwise_diversity(torch.stack([a, b]), distance)
    assert_equal(diversity, distance(a, b))


@pytest.mark.parametrize(
    ("net", "name"),
    [
        ("alex", "alexnet-owt-7be5be79.pth"),
        ("squeeze", "squeezenet1_1-b8a52dc0.pth"),
        ("vgg", "vgg16-397923af.pth"),
    ],
)
def test_lpips_without_the_file_names_it_and_does_not_download(net, name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    with pytest.raises(BackboneError) as caught:
        lpips_distance(net)
    path = tmp_path / "hub" / "checkpoints" / name
    assert_message(caught.value, "lpips_distance: weights", "no file at", str(path))


def test_lpips_finds_the_file_where_torchvision_puts_it(trunk, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(trunk.read_bytes())
    # these are other weights, and the name of the file says so
    with pytest.raises(BackboneError, match="hash in their name"):
        lpips_distance("squeeze")


def test_lpips_takes_a_file_whose_hash_is_right(trunk, tmp_path):
    digest = hashlib.sha256(trunk.read_bytes()).hexdigest()[:8]
    path = tmp_path / f"squeezenet1_1-{digest}.pth"
    path.write_bytes(trunk.read_bytes())
    expected = lpips_distance("squeeze", weights=trunk)(*batches())
    assert_equal(lpips_distance("squeeze", weights=path)(*batches()), expected)


def test_lpips_refuses_the_weights_of_another_network(trunk):
    with pytest.raises(BackboneError, match=r"those of alexnet-owt.*squeezenet\.pth"):
        lpips_distance("alex", weights=trunk)


@pytest.mark.parametrize("name", ["trunk.pth", "trunk.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR."])
def test_lpips_refuses_damaged_and_hostile_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=r"readable checkpoint; got .*trunk"):
        lpips_distance("squeeze", weights=path)


def test_lpips_refuses_a_file_without_names(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(BackboneError, match="state dict; got list"):
        lpips_distance("squeeze", weights=tmp_path / "list.pth")


def test_lpips_refuses_an_unknown_network():
    with pytest.raises(InputError, match="net must be one of 'alex', 'squeeze', 'vgg'"):
        lpips_distance("resnet")


def test_lpips_refuses_images_that_do_not_match(trunk):
    distance = lpips_distance("squeeze", weights=trunk)
    a, b = batches()
    with pytest.raises(InputError, match="images_b must have the shape of images_a"):
        distance(a, b[:1])
    with pytest.raises(InputError, match="C=3"):
        distance(a[:, :1], b[:, :1])

"""What holds for every tensor argument of every public callable; the table is rules_table.py."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from rules_table import OPS, PARTS, WITHOUT_TENSORS, Arg, Part
from torch import Tensor, nn

import dpsims
from dpsims.errors import DTypeError, InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")


# results with one entry per class, per feature or per pair of classes
KEEP_THEIR_SHAPE = {
    "FrechetFeatureDistance.update",
    "SegmentationConsistency.update",
    "class_balance_weights",
}

# buffers that the constructor derives from its arguments, in no state_dict
CONSTANTS = {"pixel_scale", "pixel_shift"}

# --- helpers


def leaves(value: Any) -> list[Tensor]:
    """Every tensor in a result; a number counts as one."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, float):
        return [torch.tensor(value, dtype=torch.float64)]
    return [leaf for item in value for leaf in leaves(item)]


def change(inputs: dict[str, Any], arg: Arg, how: Callable[[Tensor], Any], *, last: bool = False):
    """The inputs with one argument changed; of a list every map, or only the last one."""
    value = inputs[arg.name]
    if not arg.levels:
        return inputs | {arg.name: how(value)}
    if last:
        return inputs | {arg.name: [*value[:-1], how(value[-1])]}
    return inputs | {arg.name: [how(level) for level in value]}


def change_all(part: Part, how: Callable[[Tensor], Any], *kinds: str) -> dict[str, Any]:
    """The inputs with every argument of these kinds changed, by default all."""
    inputs = part.inputs()
    for arg in part.args:
        if not kinds or arg.kind in kinds:
            inputs = change(inputs, arg, how)
    return inputs


def resized(axis: int, size: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([x, x[..., :]], axis).narrow(axis, 0, size)


def floating(part: Part, inputs: dict[str, Any]) -> list[Tensor]:
    """The input tensors that a gradient flows to."""
    args = [arg for arg in part.args if arg.kind == "float"]
    args = [arg for arg in args if f"gradient-{arg.name}" not in part.exceptions]
    return [x for arg in args for x in leaves(inputs[arg.name])]


def gradients(output: Any, asked: list[Tensor]) -> list[Tensor]:
    """Of :func:`weighted_sum`; nothing where nothing requires a gradient."""
    total = weighted_sum(output)
    return list(torch.autograd.grad(total, asked)) if asked and total.requires_grad else []


def leaf_of(value: Any) -> Any:
    """A value, or the last one of a list of maps."""
    return value[-1] if isinstance(value, list) and isinstance(value[0], Tensor) else value


def run(part: Part, inputs: dict[str, Any], *, make: Callable[[], Any] | None = None) -> Any:
    return (make or part.make)()(**inputs)


def as_double(part: Part) -> Callable[..., Any]:
    called = part.make()
    return called.double() if isinstance(called, nn.Module) else called


def weighted_sum(output: Any) -> Tensor:
    """A number that depends on every entry in its own way."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in leaves(output):
        if leaf.is_floating_point():
            weights = torch.linspace(0.5, 1.5, leaf.numel(), dtype=torch.float64)
            total = total + (leaf.double().reshape(-1) * weights).sum()
    return total


def where(part: Part, arg: Arg, text: str = "") -> str:
    return "-".join(piece for piece in (part.id, arg.name, text) if piece)


def is_module(part: Part) -> bool:
    return part.sort == "module"


def has_floats(part: Part) -> bool:
    return any(arg.kind == "float" for arg in part.args)


RULES: set[str] = set()


def rows(rule: str, keep: Callable[[Part], bool] = lambda part: True) -> list[Part]:
    RULES.add(rule)
    return [part for part in PARTS if rule not in part.exceptions and keep(part)]


def each_part(rule: str, keep: Callable[[Part], bool] = lambda part: True) -> Any:
    return pytest.mark.parametrize(
        "part", [pytest.param(part, id=part.id) for part in rows(rule, keep)]
    )


def arg_rows(
    rule: str, keep: Callable[[Part, Arg], bool] = lambda part, arg: True
) -> list[tuple[Part, Arg]]:
    pairs = [(part, arg) for part in rows(rule) for arg in part.args]
    RULES.update(f"{rule}-{arg.name}" for _, arg in pairs)
    return [
        (part, arg)
        for part, arg in pairs
        if f"{rule}-{arg.name}" not in part.exceptions and keep(part, arg)
    ]


def each_arg(rule: str, keep: Callable[[Part, Arg], bool] = lambda part, arg: True) -> Any:
    found = [pytest.param(*row, id=where(*row)) for row in arg_rows(rule, keep)]
    return pytest.mark.parametrize(("part", "arg"), found)


def each_arg_with(name: str, rule: str, values: Callable[[Part, Arg], dict[str, Any]]) -> Any:
    """Every argument with every one of its values, which are given by their names in the id."""
    found = [
        pytest.param(part, arg, value, id=where(part, arg, text))
        for part, arg in arg_rows(rule)
        for text, value in values(part, arg).items()
    ]
    return pytest.mark.parametrize(("part", "arg", name), found)


def assert_contract(error: BaseException, part: Part, *arguments: str) -> None:
    """``<callable>: <argument> must <rule>; got <value>``, in fewer than 500 characters."""
    text = str(error)
    names = arguments or tuple(arg.name for arg in part.args)
    owner = "|".join(map(re.escape, part.owners))
    name = "|".join(map(re.escape, names))
    assert re.match(rf"({owner}): ({name})(\[\d+\])? must .+; got .+", text, re.DOTALL), text
    assert len(text) < 500


def assert_refuses(
    error: type[Exception], part: Part, inputs: dict[str, Any], *arguments: str
) -> str:
    called = part.make()
    with pytest.raises(error) as caught:
        called(**inputs)
    assert_contract(caught.value, part, *arguments)
    return str(caught.value)


# --- the table itself


def test_every_public_callable_is_in_the_table():
    names = {name for names in dpsims._HOMES.values() for name in names}
    for home in ("data", "losses", "metrics", "nn"):
        package = getattr(dpsims, home)
        names |= {
            name
            for name, value in vars(package).items()
            if callable(value) and not name.startswith("_")
        }
    rows = {part.name.partition(".")[0] for part in PARTS if part not in OPS}
    assert names == rows | set(WITHOUT_TENSORS)
    assert not rows & set(WITHOUT_TENSORS)


def test_valid_inputs_are_valid_and_differ_between_calls():
    for part in PARTS:
        first, second = part.inputs(), part.inputs()
        for arg in part.args:
            for one, other in zip(leaves(first[arg.name]), leaves(second[arg.name]), strict=True):
                assert one.data_ptr() != other.data_ptr(), part.id
                assert torch.equal(one, other), part.id
        assert all(leaf.numel() for leaf in leaves(run(part, first))), part.id


# --- what is refused


def _not_tensors(part: Part, arg: Arg) -> dict[str, Any]:
    others = {"list": Tensor.tolist, "text": lambda x: "images"}
    if not arg.optional:
        others["none"] = lambda x: None
    if arg.plain:
        others["array"] = Tensor.numpy
    return others


@each_arg_with("other", "wrong-type", _not_tensors)
def test_what_is_not_a_tensor_is_refused(part, arg, other):
    inputs = change(part.inputs(), arg, other, last=True)
    got = leaf_of(inputs[arg.name])
    text = assert_refuses(DTypeError, part, inputs, arg.name)
    assert type(got).__name__ in text


@each_arg("wrong-type", lambda part, arg: arg.levels)
def test_one_tensor_is_no_list_of_maps(part, arg):
    inputs = part.inputs()
    assert_refuses(DTypeError, part, inputs | {arg.name: inputs[arg.name][0]}, arg.name)
    assert_refuses(InputError, part, inputs | {arg.name: inputs[arg.name][:1]}, arg.name)


@each_arg_with("by", "wrong-rank", lambda part, arg: {f"{by:+d}": by for by in arg.ranks})
def test_a_wrong_rank_is_refused(part, arg, by):
    def other_rank(x: Tensor) -> Tensor:
        for _ in range(abs(by)):
            x = x[0] if by < 0 else x[None]
        return x

    inputs = change(part.inputs(), arg, other_rank, last=True)
    text = assert_refuses(InputError, part, inputs, arg.name)
    assert " must have shape (" in text
    assert f"got {tuple(leaf_of(inputs[arg.name]).shape)}" in text


def _misfits(part: Part, arg: Arg) -> dict[str, Any]:
    """Sizes that do not fit another argument or the constructor's; size 1 would broadcast."""
    found = {}
    shape = leaves(part.inputs()[arg.name])[-1].shape
    for position, axis in enumerate(arg.axes):
        shared = any(axis in other.axes for other in part.args if other is not arg)
        # a map of a list must also fit the other maps
        if shared or axis in arg.fixed or (arg.levels and axis == "B"):
            found |= {f"{axis}={n}": (position, n) for n in (1, shape[position] + 1)}
    return {text: (i, n) for text, (i, n) in found.items() if n != shape[i]}


@each_arg_with("misfit", "mismatch", _misfits)
def test_sizes_that_do_not_fit_are_refused_and_never_broadcast(part, arg, misfit):
    assert_refuses(InputError, part, change(part.inputs(), arg, resized(*misfit), last=True))


@each_arg("empty-axis")
def test_an_empty_axis_is_refused(part, arg):
    for position, axis in enumerate(arg.axes):
        if axis != "B":
            inputs = change(part.inputs(), arg, resized(position, 0), last=True)
            text = assert_refuses(InputError, part, inputs, arg.name)
            assert "axes must not be empty" in text, axis


def _wrong_dtypes(part: Part, arg: Arg) -> dict[str, Any]:
    dtypes = {torch.bool, torch.complex64, torch.float32, torch.int64}
    right = {
        "float": {torch.float32},
        "mask": {torch.float32},
        "int": {torch.int64},
        "real": dtypes - {torch.complex64},
    }
    return {str(dtype): dtype for dtype in sorted(dtypes - right[arg.kind], key=str)}


@each_arg_with("dtype", "wrong-dtype", _wrong_dtypes)
def test_a_wrong_dtype_is_refused(part, arg, dtype):
    inputs = change(part.inputs(), arg, lambda x: x.to(dtype), last=True)
    text = assert_refuses(DTypeError, part, inputs, arg.name)
    assert str(dtype) in text


@each_arg("sparse")
def test_a_sparse_tensor_is_refused(part, arg):
    text = assert_refuses(
        InputError, part, change(part.inputs(), arg, Tensor.to_sparse, last=True), arg.name
    )
    assert "dense" in text


@each_arg("device", lambda part, arg: len(part.args) > 1)
def test_tensors_on_two_devices_are_refused(part, arg):
    inputs = change(part.inputs(), arg, lambda x: x.to("meta"))
    text = assert_refuses(InputError, part, inputs)
    assert "device" in text
    assert "meta" in text
    assert "cpu" in text


# --- an empty batch


def batched(part: Part) -> bool:
    return any("B" in arg.axes for arg in part.args)


def emptied(part: Part) -> dict[str, Any]:
    inputs = part.inputs()
    for arg in part.args:
        if "B" in arg.axes:
            inputs = change(inputs, arg, resized(arg.axes.index("B"), 0))
    return inputs


@each_part("empty-batch", lambda part: part.sort == "loss")
def test_a_loss_of_an_empty_batch_is_zero_with_zero_gradient(part):
    called, inputs = part.make(), emptied(part)
    asked = [x.requires_grad_() for x in floating(part, inputs)]
    if isinstance(called, nn.Module):
        asked += called.parameters()
    loss = called(**inputs)
    assert loss.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, asked))


@each_part("empty-batch", lambda part: part.sort != "loss" and batched(part))
def test_an_empty_batch_gives_an_empty_result(part):
    results = []
    for inputs in (emptied(part), part.inputs()):
        called = part.make()
        results.append(leaves((called.eval() if is_module(part) else called)(**inputs)))
    sizes = {
        x.shape[arg.axes.index("B")]
        for arg in part.args
        for x in leaves(part.inputs()[arg.name])
        if "B" in arg.axes
    }
    for empty, full in zip(*results, strict=True):
        batch_first = part.id not in KEEP_THEIR_SHAPE
        wanted = (0, *full.shape[1:]) if batch_first else tuple(full.shape)
        assert tuple(empty.shape) == wanted
        assert not batch_first or {full.shape[0]} == sizes
        assert empty.isfinite().all()


@each_part("empty-batch", lambda part: part.norm)
def test_batch_statistics_of_nothing_are_refused(part):
    assert_refuses(InputError, part, emptied(part), "features")


# --- memory layouts


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _sliced(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def _expanded(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@pytest.mark.parametrize("layout", [_transposed, _sliced, _expanded, _channels_last])
@each_part("layout")
def test_the_memory_layout_does_not_matter(part, layout):
    results = []
    for how in (lambda x: layout(x).contiguous(), layout):
        inputs = change_all(part, Tensor.double, "float", "mask")
        asked = [x.requires_grad_() for x in floating(part, inputs)]
        for arg in part.args:
            inputs = change(inputs, arg, how)
        output = as_double(part)(**inputs)
        results.append([*leaves(output), *gradients(output, asked)])
    for plain, other in zip(*results, strict=True):
        # float64 sums in another order
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)


@each_part("channels-last", lambda part: is_module(part) and part.args[0].axes[-1] in "Ww")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_channels_last_maps_stay_channels_last(part, training):
    module = part.make().train(training).to(memory_format=torch.channels_last)
    output = module(**change_all(part, _channels_last))
    assert all(leaf.is_contiguous(memory_format=torch.channels_last) for leaf in leaves(output))


# --- numbers


def _wide(x: Tensor) -> Tensor:
    """Numbers that float32 cannot hold."""
    return x.double() * (1 + 2**-40)


@each_part("float64", has_floats)
def test_float64_stays_float64(part):
    inputs = change_all(part, Tensor.double, "mask")
    for arg in part.args:
        if arg.kind == "float":
            inputs = change(inputs, arg, _wide)
    output = [x for x in leaves(as_double(part)(**inputs)) if x.is_floating_point()]
    assert {leaf.dtype for leaf in output} == {torch.float64}
    # what went through float32 is a float32 number
    assert any((leaf != leaf.float().double()).any() for leaf in output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_part("half", has_floats)
def test_half_precision_is_finite_and_losses_are_float32(part, dtype):
    called = part.make()
    if isinstance(called, nn.Module):
        called = called.to(dtype)
    wanted = torch.float32 if part.sort == "loss" else dtype
    for leaf in leaves(called(**change_all(part, lambda x: x.to(dtype), "float", "mask"))):
        assert leaf.isfinite().all()
        assert leaf.dtype == wanted or part.sort == "function"


@each_part("autocast", has_floats)
def test_autocast_is_finite_and_losses_are_float32(part):
    inputs = part.inputs()
    asked = [x.requires_grad_() for x in floating(part, inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        output = part.make()(**inputs)
    assert all(leaf.isfinite().all() for leaf in leaves(output))
    assert part.sort != "loss" or output.dtype == torch.float32
    for x, grad in zip(asked, gradients(output, asked), strict=False):
        assert grad.dtype == x.dtype
        assert grad.isfinite().all()


@each_part("wide", lambda part: part.wide)
def test_the_largest_half_precision_numbers_stay_finite(part):
    inputs = part.inputs()
    for arg in part.args:
        # a pair of latents of one sign would be equal
        if arg.kind == "float" and not arg.name.startswith("latents_"):
            inputs = change(inputs, arg, lambda x: (60000 * x.sign()).half())
    asked = [x.requires_grad_() for x in floating(part, inputs)]
    called = part.make()
    output = (called.half() if isinstance(called, nn.Module) else called)(**inputs)
    for value in [*leaves(output), *gradients(output, asked)]:
        assert value.isfinite().all()


@each_arg("nan", lambda part, arg: arg.kind in ("float", "mask"))
def test_nan_propagates(part, arg):
    def poisoned(x: Tensor) -> Tensor:
        x = x.clone()
        (x.view(-1)[:1] if "one-nan" not in part.exceptions else x[0]).fill_(torch.nan)
        return x

    output = leaves(run(part, change(part.inputs(), arg, poisoned, last=True)))
    assert any(leaf.isnan().any() for leaf in output)


# --- side effects


@each_part("not-mutated")
def test_inputs_are_not_changed(part):
    inputs, before = part.inputs(), part.inputs()
    tensors = [x for arg in part.args for x in leaves(inputs[arg.name])]
    copies = [x for arg in part.args for x in leaves(before[arg.name])]
    for x in floating(part, inputs):
        x.requires_grad_()
    versions = [x._version for x in tensors]
    gradients(run(part, inputs), floating(part, inputs))
    assert [x._version for x in tensors] == versions
    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy)


def global_state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(np.random.get_state()),  # noqa: NPY002
        "python generator": random.getstate(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        "mkldnn": torch.backends.mkldnn.enabled,
        "warnings": list(warnings.filters),
    }


@each_part("global-state")
def test_global_state_is_not_touched(part):
    called, inputs = part.make(), part.inputs()
    asked = [x.requires_grad_() for x in floating(part, inputs)]
    before = global_state()
    gradients(called(**inputs), asked)
    assert global_state() == before


@each_part("repeat")
def test_a_second_call_gives_the_same(part):
    first, second = part.make(), part.make()
    for one, other in zip(
        leaves(first(**part.inputs())), leaves(second(**part.inputs())), strict=True
    ):
        assert torch.equal(one, other)


# --- modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_part("modes")
def test_modes_without_gradients_give_the_same_numbers(part, mode):
    wanted = leaves(run(part, part.inputs()))
    with mode():
        got = leaves(run(part, part.inputs()))
    for one, other in zip(wanted, got, strict=True):
        assert not other.requires_grad
        torch.testing.assert_close(other, one.detach(), rtol=1e-6, atol=1e-7)


@each_part("requires-grad", has_floats)
def test_results_require_a_gradient_only_if_something_does(part):
    called = part.make()
    learns = isinstance(called, nn.Module) and any(p.requires_grad for p in called.parameters())
    output = [x for x in leaves(called(**part.inputs())) if x.is_floating_point()]
    assert all(leaf.requires_grad == learns for leaf in output)


@each_part("deterministic")
def test_deterministic_algorithms_run(part):
    results = []
    for deterministic in (False, True):
        inputs = part.inputs()
        asked = [x.requires_grad_() for x in floating(part, inputs)]
        torch.use_deterministic_algorithms(deterministic)
        try:
            output = run(part, inputs)
            results.append([*leaves(output), *gradients(output, asked)])
        finally:
            torch.use_deterministic_algorithms(False)
    # new memory is filled with NaN in this mode: none of it may be read
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-7)


@each_part("meta")
def test_meta_tensors_give_the_right_shapes(part):
    wanted = leaves(run(part, part.inputs()))
    called = part.make()
    if isinstance(called, nn.Module):
        called = called.to("meta")
    got = leaves(called(**change_all(part, lambda x: x.to("meta"))))
    for one, other in zip(wanted, got, strict=True):
        assert other.is_meta
        assert (other.shape, other.dtype) == (one.shape, one.dtype)


@each_part("functional", lambda part: part.sort == "loss")
def test_torch_func_gives_autograds_gradient(part):
    name = part.args[0].name
    inputs = part.inputs()
    called = part.make()

    def loss(x: Tensor) -> Tensor:
        return called(**(inputs | {name: x}))

    x = inputs[name].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(inputs[name]), wanted)
    pair = torch.stack([inputs[name], 2 * inputs[name]])
    got = torch.func.vmap(loss)(pair)
    torch.testing.assert_close(got, torch.stack([loss(pair[0]), loss(pair[1])]))


# --- copies


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", ["deepcopy", "state-dict"])
@each_part("copies", lambda part: isinstance(part.make(), nn.Module))
def test_copies_give_equal_outputs(part, way, training):
    module = part.make()
    module(**part.inputs())  # no longer the first running statistics
    if way == "deepcopy":
        copy = deepcopy(module)
    else:
        copy = part.make()
        with torch.no_grad():
            for name, value in [*copy.named_parameters(), *copy.named_buffers()]:
                if name.rpartition(".")[2] not in CONSTANTS:
                    value.add_(1)
        copy.load_state_dict(module.state_dict())
    results = [leaves(m.train(training)(**part.inputs())) for m in (module, copy)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_every_exception_of_the_table_is_to_a_rule():
    gradient = {f"gradient-{arg.name}" for part in PARTS for arg in part.args}
    named = {rule for part in PARTS for rule in part.exceptions}
    assert named <= RULES | gradient | {"one-nan"}

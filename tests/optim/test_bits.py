"""AdamW in one pass is torch's fused AdamW, bit for bit: weights, both moments and the step count.

Where the number of elements is no multiple of a vector's 16, torch's kernel ends with a scalar loop whose compiler fused other products and
sums: there the second moment is one rounding apart. Measured on x86 with AVX2 and AVX512; torch builds its other kernels without fused
instructions, and for those nothing is claimed.
"""

import copy
import io
import pickle

import pytest
import torch
from tests.cases import gaussian, seeded

from stepwell.formats import integer
from stepwell.optim import AdamW, engines
from stepwell.optim.task import Task

SETTINGS = {
    "default": {},
    "strong decay": {"lr": 3e-2, "betas": (0.8, 0.95), "weight_decay": 0.3},
    "no decay": {"weight_decay": 0.0, "eps": 1e-3},
    "short memory": {"betas": (0.3, 0.9)},  # below 1/2 torch mixes from the other end
    "half": {"betas": (0.5, 0.9)},
    "no first moment": {"betas": (0.0, 0.99)},
    "maximize": {"maximize": True},
    "tensor rate": {"lr": torch.tensor(1e-3)},
    "rate 0": {"lr": 0.0},
}
SHAPES = {"blocks of 32": (24, 96, 32), "blocks of 48": (16, 48, 48), "channels": (7, 1024, 1024), "tensor": (40, 80, 3200)}
has_vectors = pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="torch has no AVX kernels here")
SCALAR = 16  # elements of the longest vector: what does not fill one is stepped by torch's scalar loop


def gradients(shape, steps):
    """Return gradients of very different sizes, with zeros, subnormal and nearly infinite numbers among them."""
    found = []
    for step in range(steps):
        gradient = gaussian(*shape, seed=step) * 10.0 ** -(step % 9)
        gradient[0, ::3] = 0
        gradient[1, ::3] = 1e-41
        gradient[2, ::3] = 1e18
        found.append(gradient if step != 3 else torch.zeros(shape))
    return found


def state_of(optimizer, parameter):
    """Return everything that a step changes."""
    state = optimizer.state[parameter]
    return [parameter.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]]


def differing(ours, theirs):
    """Return the flat places where two tensors do not hold the same bits; one NaN is like another."""
    bits = [tensor.reshape(-1).view(torch.int32) for tensor in (ours, theirs)]
    return ((bits[0] != bits[1]) & ~(ours.reshape(-1).isnan() & theirs.reshape(-1).isnan())).nonzero().flatten()


def pair(shape, **settings):
    """Return our parameter and optimizer, and torch's, which start alike."""
    made = []
    for kind in (AdamW, lambda parameters, **options: torch.optim.AdamW(parameters, fused=True, **options)):
        parameter = torch.nn.Parameter(0.1 * gaussian(*shape, seed=99))
        made += [parameter, kind([parameter], **copy.deepcopy(settings))]
    return made


@has_vectors
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_kernel_without_a_method_is_torchs_fused_step(kernel, settings, shape):
    rows, columns, block = SHAPES[shape]
    ours, one, theirs, two = pair((rows, columns), **SETTINGS[settings])
    for gradient in gradients((rows, columns), 40):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.assign({ours: Task(integer(4), block)})
        one.step()
        two.step()
        assert torch.equal(ours.grad, gradient)
    for found, expected in zip(state_of(one, ours), state_of(two, theirs), strict=True):
        assert not differing(found, expected).numel()
    assert not torch.equal(ours, 0.1 * gaussian(rows, columns, seed=99)) or settings == "rate 0"


@has_vectors
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_what_is_not_finite_spreads_as_in_torch(kernel, odd, where):
    ours, one, theirs, two = pair((8, 64))
    for step, gradient in enumerate(gradients((8, 64), 4)):
        if step == 1 and where == "gradient":
            gradient[5, 7] = odd
        if step == 1 and where == "weight":
            ours.data[5, 7] = theirs.data[5, 7] = odd
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.assign({ours: Task(integer(4), 32)})
        one.step()
        two.step()
    for found, expected in zip(state_of(one, ours), state_of(two, theirs), strict=True):
        assert not differing(found, expected).numel()
    assert (~ours.isfinite()).sum() == 1


@has_vectors
@pytest.mark.parametrize("columns", [1, 5, 15, 17, 49, 127, 129, 300])
def test_tail_is_one_rounding_apart(kernel, columns):
    """One step from equal states. The second moment may differ by an ulp, and the weight by what that is worth: half an ulp of the move."""
    ours, one, theirs, two = pair((3, columns), lr=1e-2)
    state = (gaussian(3, columns, seed=1) * 1e-3, gaussian(3, columns, seed=2).square() * 1e-4)
    for parameter, optimizer in ((ours, one), (theirs, two)):
        first, second = (tensor.clone() for tensor in state)
        optimizer.state[parameter] = {"step": torch.tensor(6.0), "exp_avg": first, "exp_avg_sq": second}
        parameter.grad = gaussian(3, columns, seed=3) * 1e-2
    one.assign({ours: Task(integer(4), columns)})
    one.step()
    two.step()
    end = 3 * columns // SCALAR * SCALAR
    found, expected = state_of(one, ours), state_of(two, theirs)
    assert torch.equal(found[1], expected[1])
    for k in (0, 2):
        assert (differing(found[k], expected[k]) >= end).all()
    assert ((found[2] - expected[2]).abs() <= 2.0**-23 * expected[2]).all()
    # an ulp of the second moment is half an ulp of its root, and so of the move, which is below 3 rates; then weight and move are rounded
    assert ((found[0] - expected[0]).abs() <= 2.0**-23 * (3 * 1e-2 + expected[0].abs())).all()


def test_threads_leave_no_trace(kernel, monkeypatch):
    monkeypatch.setattr(engines, "WORTH", 1000)
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            ours, one, _, _ = pair((515, 96))
            for gradient in gradients((515, 96), 4):
                ours.grad = gradient
                one.assign({ours: Task(integer(3), 32, loss_terms=64.0, strength=1.0, through_scale=True, reach=10.0)})
                one.step()
        finally:
            torch.set_num_threads(before)
        found.append(state_of(one, ours))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


PLAIN = {
    "amsgrad": lambda: ([torch.nn.Parameter(gaussian(6, 32, seed=0))], {"amsgrad": True}),
    "maximize": lambda: ([torch.nn.Parameter(gaussian(6, 32, seed=0))], {"maximize": True, "lr": torch.tensor(0.01)}),
    "transposed": lambda: ([torch.nn.Parameter(gaussian(6, 32, seed=0).T)], {}),
    "double": lambda: ([torch.nn.Parameter(gaussian(6, 32, seed=0, dtype=torch.float64))], {}),
    "bfloat16": lambda: ([torch.nn.Parameter(gaussian(6, 32, seed=0).bfloat16())], {}),
    "groups": lambda: (
        [{"params": [torch.nn.Parameter(gaussian(k, 33, seed=k))], "lr": 10.0**-k, "weight_decay": 0.1 * k} for k in (1, 2, 3)],
        {"betas": (0.7, 0.8)},
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_without_a_run_it_is_torchs_optimizer(case):
    """Whatever torch's fused step can do; parameters without a gradient are left alone."""
    found = []
    for kind in (AdamW, lambda given, **options: torch.optim.AdamW(given, fused=True, **options)):
        given, options = PLAIN[case]()
        optimizer = kind(given, **options)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for step in range(5):
            for k, parameter in enumerate(held):
                gradient = torch.randn(parameter.shape, generator=seeded(10 * step + k)).to(parameter.dtype)
                parameter.grad = None if (step, k) == (2, len(held) - 1) else gradient
            optimizer.step()
        found.append([*(parameter.detach() for parameter in held), *(v for p in held for v in optimizer.state[p].values())])
    assert len(found[0]) > 3
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_sparse_gradients_raise_torchs_own_error():
    parameter = torch.nn.Parameter(torch.zeros(4, 32))
    parameter.grad = torch.ones(4, 32).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        AdamW([parameter]).step()


@has_vectors
def test_state_dictionaries_go_both_ways_and_training_goes_on_with_the_same_bits(kernel):
    shape, steps = (16, 64), gradients((16, 64), 9)
    task = Task(integer(4), 32)

    def advance(parameter, optimizer, gradient):
        parameter.grad = gradient.clone()
        if isinstance(optimizer, AdamW):
            optimizer.assign({parameter: task})
        optimizer.step()

    ours, one, theirs, two = pair(shape, lr=1e-2, weight_decay=0.2)
    for gradient in steps[:3]:
        advance(ours, one, gradient)
        advance(theirs, two, gradient)
    assert one.state_dict()["param_groups"] == two.state_dict()["param_groups"]
    stored = io.BytesIO()
    torch.save((one.state_dict(), two.state_dict()), stored)
    stored.seek(0)
    states = torch.load(stored, weights_only=True)
    swapped_ours, swapped_one, swapped_theirs, swapped_two = pair(shape)
    swapped_one.load_state_dict(states[1])
    swapped_two.load_state_dict(states[0])
    swapped_ours.data.copy_(theirs.data)
    swapped_theirs.data.copy_(ours.data)
    for gradient in steps[3:]:
        for parameter, optimizer in ((ours, one), (swapped_ours, swapped_one), (swapped_theirs, swapped_two)):
            advance(parameter, optimizer, gradient)
    for parameter, optimizer in ((swapped_ours, swapped_one), (swapped_theirs, swapped_two)):
        assert all(torch.equal(*both) for both in zip(state_of(one, ours), state_of(optimizer, parameter), strict=True))


@has_vectors
@pytest.mark.parametrize("foreach", [None, True])
def test_state_of_torchs_other_implementations_goes_on_fused(kernel, foreach):
    """And moments that come with another layout of memory are stepped all the same."""
    ours, one, theirs, _ = pair((16, 64))
    saved = torch.optim.AdamW([theirs], lr=0.02, foreach=foreach)
    theirs.grad = gaussian(16, 64, seed=0)
    saved.step()
    state = copy.deepcopy(saved.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        state["state"][0][key] = state["state"][0][key].T.contiguous().T
    one.load_state_dict(state)
    ours.data.copy_(theirs.data)
    assert (one.param_groups[0]["fused"], one.param_groups[0]["foreach"], one.param_groups[0]["lr"]) == (True, None, 0.02)
    fused = torch.optim.AdamW([theirs], fused=True)
    fused.load_state_dict({**saved.state_dict(), "param_groups": one.state_dict()["param_groups"]})
    for parameter, optimizer in ((ours, one), (theirs, fused)):
        parameter.grad = gaussian(16, 64, seed=1)
        if optimizer is one:
            one.assign({ours: Task(integer(4), 32)})
        optimizer.step()
    assert all(torch.equal(*both) for both in zip(state_of(one, ours), state_of(fused, theirs), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"])
def test_copies_step_like_the_original(copied):
    ours, one, _, _ = pair((8, 32))
    ours.grad = gaussian(8, 32, seed=0)
    one.step()
    other = copied(one)
    (twin,) = other.param_groups[0]["params"]
    twin.grad = ours.grad.clone()
    for optimizer in (one, other):
        optimizer.step()
    assert torch.equal(twin, ours)


@pytest.mark.parametrize("option", [{"foreach": True}, {"capturable": True}, {"differentiable": True}, {"fused": False}], ids=str)
def test_what_a_fused_step_cannot_do_is_refused(option):
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"`{name}` must not be {value}.*torch.optim.AdamW"):
        AdamW([torch.nn.Parameter(torch.zeros(2))], **option)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        AdamW([torch.nn.Parameter(torch.zeros(2))], lr=-1.0)
    AdamW([torch.nn.Parameter(torch.zeros(2))], **{name: not value})


def test_writes_are_seen_by_autograd(kernel):
    ours, one, _, _ = pair((4, 32))
    ours.grad = gaussian(4, 32, seed=0)
    loss = (torch.ones(2, 32, requires_grad=True) @ ours.T).sum()
    one.assign({ours: Task(integer(4), 32)})
    one.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

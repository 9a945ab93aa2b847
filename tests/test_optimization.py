"""Learning-rate schedules against written-out tables, and optimizers against their formulas."""

import pytest
import torch

from dls_training.optimization import esresnet, make_optimizer, make_scheduler, multistep
from dls_training.settings import SCHEDULES


def rates(name, total_steps, steps_per_epoch, steps):
    """The factor at each step of a run."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer("sgd", [parameter], 2.0, 0.0)
    scheduler = make_scheduler(name, optimizer, total_steps, steps_per_epoch)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"] / 2.0)
        parameter.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("total", "first_tenth", "first_hundredth"), [(10, 6, 8), (200, 120, 160), (7, 5, 6), (1250, 750, 1000)]
)
def test_multistep(total, first_tenth, first_hundredth):
    expected = [1.0] * first_tenth + [0.1] * (first_hundredth - first_tenth) + [0.01] * (total - first_hundredth)
    assert [multistep(step, total) for step in range(total)] == pytest.approx(expected)
    assert rates("multistep", total, 3, total) == pytest.approx(expected)


# Epoch -> factor: five cold epochs, ten of warm-up, then the decay.
ESRESNET = {0: 0.1, 4: 0.1, 5: 0.1, 6: 0.19, 10: 0.55, 14: 0.91, 15: 1.0, 16: 0.985, 17: 0.970225, 25: 0.985**10}


def test_esresnet():
    for epoch, factor in ESRESNET.items():
        assert esresnet(epoch) == pytest.approx(factor), epoch


def test_esresnet_changes_with_the_epoch_not_the_step():
    factors = rates("esresnet", 26 * 4, 4, 26 * 4)
    for epoch, factor in ESRESNET.items():
        assert factors[4 * epoch : 4 * epoch + 4] == pytest.approx([factor] * 4), epoch


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedules_of_transformers_start_at_once_and_last_the_whole_run(name, expected):
    assert rates(name, 4, 1, 4) == pytest.approx(expected)


@pytest.mark.parametrize("warmup_steps", [2, 0.25])
def test_warm_up(warmup_steps):
    optimizer = make_optimizer("sgd", [torch.nn.Parameter(torch.zeros(2))], 2.0, 0.0)
    scheduler = make_scheduler("linear", optimizer, 8, 2, warmup_steps)
    factors = []
    for _ in range(8):
        factors.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    assert factors == pytest.approx([0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_every_schedule_on_the_command_line_exists():
    for name in SCHEDULES:
        assert len(rates(name, 8, 2, 8)) == 8


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_goes_on_from_its_state(name):
    whole = rates(name, 12, 3, 12)
    optimizer = make_optimizer("sgd", [torch.nn.Parameter(torch.zeros(2))], 2.0, 0.0)
    scheduler = make_scheduler(name, optimizer, 12, 3)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    later = make_optimizer("sgd", [torch.nn.Parameter(torch.zeros(2))], 2.0, 0.0)
    continued = make_scheduler(name, later, 12, 3)
    later.load_state_dict(optimizer.state_dict())
    continued.load_state_dict(scheduler.state_dict())
    factors = []
    for _ in range(5):
        factors.append(later.param_groups[0]["lr"] / 2.0)
        later.step()
        continued.step()
    assert factors == pytest.approx(whole[7:])


def slow_steps(name, start, gradients, rate, decay):
    """The optimizers' formulas for one number, in Python."""
    value, momentum, square = start, 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        if name == "adamw":  # decay apart from the gradient
            value -= rate * decay * value
        else:
            gradient = gradient + decay * value
        if name == "sgd":
            momentum = 0.9 * momentum + gradient
            value -= rate * momentum
            continue
        momentum = 0.9 * momentum + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        value -= rate * (momentum / (1 - 0.9**step)) / ((square / (1 - 0.999**step)) ** 0.5 + 1e-8)
    return value


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers(name, decay):
    gradients = [0.5, -0.2, 0.7, 0.1]
    for shape in [(1,), (3, 5), (2, 3, 3, 3)]:
        parameter = torch.nn.Parameter(torch.full(shape, 0.8))
        if len(shape) == 4:  # as the loop has them
            parameter = torch.nn.Parameter(parameter.detach().to(memory_format=torch.channels_last))
        optimizer = make_optimizer(name, [parameter], 0.05, decay)
        assert optimizer.defaults["fused"]
        for gradient in gradients:
            parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
        expected = torch.full(shape, slow_steps(name, 0.8, gradients, 0.05, decay))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_unknown_optimizer():
    with pytest.raises(KeyError):
        make_optimizer("lamb", [torch.nn.Parameter(torch.zeros(1))], 0.1, 0.0)

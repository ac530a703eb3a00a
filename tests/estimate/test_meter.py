"""What the meter counts of tensors without memory, where the bytes are known."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from medtune.estimate.meter import Meter


@pytest.fixture
def weights() -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(1000, 2000, requires_grad=True)


def test_the_peak_is_what_lives_together(weights):
    meter = Meter(block=1)
    assert meter.count(weights, weights.t()) == 4 * 1000 * 2000  # a view takes nothing
    with torch.no_grad(), meter.moment("products"):
        first = weights @ torch.ones(2000, 10)  # two tensors of 80,000 and 40,000 bytes
        del first
        weights @ torch.ones(2000, 10)
    moment = meter.moments["products"]
    assert moment.before == 4 * 1000 * 2000
    assert moment.peak - moment.before == 4 * (2000 * 10 + 1000 * 10)
    assert meter.live == moment.before
    assert moment.work.products == 2 * 2 * 1000 * 2000 * 10


def test_what_the_backward_pass_needs_stays_until_then(weights):
    meter = Meter(block=1)
    meter.count(weights)
    with meter.moment("forward pass"):
        loss = (weights * 2.0).exp().sum()
    kept = meter.live - meter.moments["forward pass"].before
    assert kept == 4 * 1000 * 2000 + 4  # the result of exp, and the loss
    with meter.moment("backward pass"):
        loss.backward()
    del loss
    assert meter.live == 2 * 4 * 1000 * 2000  # weights and gradient


def test_a_block_is_the_least_that_is_given():
    meter = Meter(block=512)
    assert meter.count(torch.empty(1), torch.empty(512, dtype=torch.uint8), torch.empty(513, dtype=torch.uint8)) == 2048


def test_a_real_mask_chooses_from_fake_states(weights):
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[[3, 5]] = True
    with Meter():
        assert weights[mask].shape == (2, 2000)


def test_attention_costs_two_products_forward_and_five_backward():
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (torch.empty(2, 3, 7, 16, requires_grad=True) for _ in range(3))
    meter = Meter()
    with meter.moment("forward"):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    with meter.moment("backward"):
        output.sum().backward()
    product = 2 * 2 * 3 * 7 * 7 * 16
    assert meter.moments["forward"].work.attention == 2 * product
    assert meter.moments["backward"].work.attention == 5 * product

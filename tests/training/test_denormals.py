"""Training on a CPU does not compute with denormal numbers; ordinary ones are what they were."""

import torch

from finetune.training.run import denormals_dropped


def test_numbers_too_small_to_matter_count_as_zero() -> None:
    small, ordinary = torch.full((64,), 2e-38), torch.linspace(-3, 3, 64)
    before = ordinary.exp() * 0.1
    with denormals_dropped(torch.device("cpu")):
        assert (small * 0.1 == 0).all()
        assert torch.equal(ordinary.exp() * 0.1, before)
    assert (small * 0.1 > 0).all()  # the process that trained is as it was
    with denormals_dropped(torch.device("meta")):
        assert (small * 0.1 > 0).all()

import pytest
import torch

from bincomm.codes.observations import most_certain


def test_the_most_certain_images():
    logits = torch.tensor([[0.5, 0.0], [-2.0, -1.0], [3.0, -1.0], [0.5, -5.0], [-0.1, -0.5]])
    assert most_certain(logits, 0, 2) == ([2, 0], [1, 4])
    assert most_certain(logits, 0, 9) == ([2, 0, 3], [1, 4])
    assert most_certain(logits, 1, 3) == ([], [3, 1, 2])
    with pytest.raises(ValueError, match="bit"):
        most_certain(logits, 2)

from types import SimpleNamespace

import torch

from bincomm.data.dali import run_pipeline


def test_on_a_gpu_the_outputs_come_on_the_current_stream(monkeypatch):
    """DALI takes the stream by position; by name it would be one of the pipeline's inputs."""
    given = []

    class Stub:
        def run(self, cuda_stream=None, /, **inputs):
            given.append((cuda_stream, inputs))
            return []

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    assert run_pipeline(Stub(), torch.device("cuda")) == []
    assert given == [(7, {})]

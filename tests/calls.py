"""What a piece of code asks PyTorch for."""

from torch.utils._python_dispatch import TorchDispatchMode

# Operations that launch nothing on a GPU.
FREE = {
    *("alias", "detach", "empty", "expand", "new_empty", "select", "slice", "split_with_sizes", "t"),
    *("transpose", "unbind", "view"),
}


class Calls(TorchDispatchMode):
    """Gathers the names of all operations but those that launch nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))

"""The tensors that a model has before it runs: parameters, buffers, and other attributes of its modules."""

from torch import Tensor, nn


class State:
    """Knows the tensors of a model by identity, and keeps tensors of unknown origin as constants.

    Args:
        root: the model.
        prefix: the prefix for the names of constants.
    """

    def __init__(self, root: nn.Module, prefix: str):
        self._prefix = prefix
        self.constants: dict[str, Tensor] = {}  # by the name that the graph reads them by
        self.frozen: dict[str, str] = {}  # values that may fit the example alone -> the line that reads them
        self.kept = False  # whether some of these may have been kept from an earlier run
        known = {id(t): (name, t) for name, t in (*root.named_parameters(), *root.named_buffers())}
        self._parameters = {id(parameter) for parameter in root.parameters()}
        # Attributes of modules that are neither parameters nor buffers.
        self._kept: dict[int, tuple[str, Tensor]] = {}
        for path, module in root.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and id(value) not in known:
                    self._kept[id(value)] = (f"{path}.{name}" if path else name, value)
        self._known = known | self._kept

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of a parameter or buffer; None for any other tensor."""
        return None if id(tensor) in self._kept else self._known.get(id(tensor), (None, None))[0]

    def is_trained(self, name: str) -> bool:
        """Say whether the tensor that the graph reads by ``name`` is a parameter."""
        return any(known == name and at in self._parameters for at, (known, _) in self._known.items())

    def read(self, tensor: Tensor, where: str) -> str:
        """Return the name by which the graph reads ``tensor``, which no recorded operation made."""
        if id(tensor) not in self._known:
            self.kept = True
            return self.add(tensor, f"a tensor {tuple(tensor.shape)} that no recorded operation made", where)
        name, _ = self._known[id(tensor)]
        if id(tensor) in self._kept:
            self.kept = True
            self.frozen.setdefault(f"{name!r}, a tensor that is kept on its module and is no buffer", where)
        return name

    def add(self, tensor: Tensor, what: str, where: str) -> str:
        """Return the name by which the graph reads ``tensor`` as a constant."""
        name = f"{self._prefix}_{len(self.constants)}"
        self.constants[name] = tensor.detach().clone()
        self._known[id(tensor)] = name, tensor  # the reference keeps its identity from being reused
        self.frozen.setdefault(what, where)
        return name

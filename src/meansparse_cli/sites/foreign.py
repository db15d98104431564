"""What a network's own code does that its modules do not show: it raises, uses loose weights, or computes unseen."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import DataError, SiteError


def forward_failed(error: BaseException, where: str) -> DataError:
    return DataError(
        f"the model's forward pass failed {where}: {type(error).__name__}: {error}",
        hint="is this the model's data set (--dataset NAME or PATH; cifar10 where none is named), and does the model "
        "take batches of any size in float32?",
    )


class Registered:
    """The modules, parameters and buffers of a model: what its weights and its mode reach."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}

    def check(self, part: object, where: str) -> None:
        """SiteError for a parameter, or a module with a state or a mode, that is used at ``where`` and is not of them.

        A plain ``nn.ReLU`` in a list does no harm: its call is seen as a function. Nor does a module made on the way
        that holds registered ones.
        """
        if id(part) in self._known or not isinstance(part, nn.Module | nn.Parameter):
            return
        is_random = isinstance(part, nn.modules.dropout._DropoutNd) and part.training
        state = [part] if isinstance(part, nn.Parameter) else [*part.parameters(), *part.buffers()]
        if is_random or any(id(tensor) not in self._known for tensor in state):
            what = f"parameter of shape {tuple(part.shape)}" if isinstance(part, nn.Parameter) else type(part).__name__
            raise SiteError(
                f"{where} uses a {what} that is not registered: not among the model's weights, nor put in eval mode",
                hint="keep them in nn.ModuleList, nn.ModuleDict, nn.ParameterList, not in a plain list or dict",
            )


class Underneath(TorchDispatchMode):
    """Shows ``see`` every operation, also those of scripted code, which makes no call that Python sees."""

    def __init__(self, see: Callable[[Any, tuple[Any, ...]], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.see(func, args)
        return func(*args, **kwargs or {})

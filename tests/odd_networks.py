"""Networks as people really write them, for images (1, 8, 8) and ten classes; each is odd in one way."""

import sys
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """The plain one; ``forward`` of the others changes what goes in or comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)).mean((2, 3))

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def forward(self, x: Tensor) -> Any:
        return self.logits(x)


class Tuple(Net):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return self.head(features), features


class ListAfterNone(Net):
    def forward(self, x: Tensor) -> Any:
        return [None, self.logits(x)]


class Dict(Net):
    def forward(self, x: Tensor) -> Any:
        hidden = self.features(x)
        return {"loss": None, "hidden": hidden, "logits": self.head(hidden)}


class DictOther(Net):
    def forward(self, x: Tensor) -> Any:
        return {"out": self.logits(x)}


Output = namedtuple("Output", "hidden logits")


class Record(Net):
    def forward(self, x: Tensor) -> Any:
        hidden = self.features(x)
        return Output(hidden, self.head(hidden))


@dataclass
class Kept:
    logits: Tensor


class DataClass(Net):
    def forward(self, x: Tensor) -> Any:
        return Kept(self.logits(x))


class Nothing(Net):
    def forward(self, x: Tensor) -> Any:
        self.logits(x)


class FeaturesFirst(Net):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.conv(x)), self.logits(x)


class Maps(Net):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.conv(x))


class OneRow(Net):
    def forward(self, x: Tensor) -> Any:
        return self.logits(x)[:1]


class Labels(Net):
    def forward(self, x: Tensor) -> Any:
        return self.logits(x).argmax(1)


class Double(Net):
    def forward(self, x: Tensor) -> Any:
        return self.logits(x).double()


class HalfInside(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).half())


def half() -> nn.Module:
    return Net().half()


class InSequence(Net):
    """As a transformers model keeps its layers: a tuple on the way, logits at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Tuple(), Tuple()])

    def forward(self, x: Tensor) -> Any:
        return sum(layer(x)[0] for layer in self.layers)


def parallel() -> nn.Module:
    return nn.DataParallel(Tuple())


def compiled() -> nn.Module:
    return torch.compile(Tuple())


class FixedBatch(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).view(16, 4))


class InPlace(Net):
    def forward(self, x: Tensor) -> Any:
        return self.logits(x.sub_(0.5).div_(0.25))


class NotInPlace(Net):
    def forward(self, x: Tensor) -> Any:
        return self.logits(x.sub(0.5).div(0.25))


class NoGrad(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return self.logits(x)


class Detached(Net):
    def forward(self, x: Tensor) -> Any:
        return self.logits(x.detach())


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(checkpoint(self.features, x, use_reentrant=False))


class NaN(Net):
    def forward(self, x: Tensor) -> Any:
        return self.logits(x) * float("nan")


class InList(Net):
    """The convolution is no module of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Conv2d(4, 4, 3), nn.ReLU()]

    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class InDict(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norms = {"a": nn.BatchNorm2d(4, affine=False)}

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.norms["a"](self.conv(x))).mean((2, 3))


class LooseParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [nn.Parameter(torch.ones(10))]

    def forward(self, x: Tensor) -> Any:
        return self.logits(x) * self.scales[0]


class LooseDropout(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = [nn.Dropout()]

    def features(self, x: Tensor) -> Tensor:
        return self.drop[0](super().features(x))


class LooseActivation(Net):
    """Harmless: it has no weights, no mode, and is seen as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.act = None
        self.acts = (nn.ReLU(),)

    def features(self, x: Tensor) -> Tensor:
        return self.acts[0](self.conv(x)).mean((2, 3))


class MadeOnTheWay(Net):
    """A module of its own in each pass, as ODE solvers wrap their function; all it holds is registered."""

    def features(self, x: Tensor) -> Tensor:
        return nn.Sequential(self.conv, self.act)(x).mean((2, 3))


class NoneRegistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Flatten(), nn.Linear(64, 10), nn.ReLU()]

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


@torch.jit.script
def scripted_gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


class CallsScripted(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.act(scripted_gelu(self.conv(x))).mean((2, 3))


class HoldsScripted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.jit.script(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Tanh()))

    def features(self, x: Tensor) -> Tensor:
        return super().features(self.stem(x))


class ScriptedActivation(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = torch.jit.trace(nn.SiLU(), torch.rand(2, 4, 6, 6))

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.other(self.conv(x))).mean((2, 3))


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x.mul(x.sigmoid())


class Swish(nn.Module):
    """As timm's: a module that is an activation, whatever it calls."""

    def forward(self, x: Tensor) -> Tensor:
        return swish(x)


class TimmsSwish(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = Swish()


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU()))


def graph() -> nn.Module:
    return torch.fx.symbolic_trace(Net())


def exported() -> Any:
    return torch.export.export(Net(), (torch.rand(2, 1, 8, 8),)).module()


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, torch.qint8)


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.ReLU(), nn.LazyLinear(10))


def meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


class Exits(Net):
    def forward(self, x: Tensor) -> Any:
        sys.exit()


class ExitsLater(Net):
    """Only on the batches of a command, not on the few images that a network is tried on."""

    def forward(self, x: Tensor) -> Any:
        if len(x) > 4:
            sys.exit(0)
        return self.logits(x)


class Recurses(Net):
    def forward(self, x: Tensor) -> Any:
        return self.forward(x)


class Interrupts(Net):
    def forward(self, x: Tensor) -> Any:
        raise KeyboardInterrupt


class Fails(Net):
    def forward(self, x: Tensor) -> Any:
        raise NotImplementedError("[/] later")


class Prints(Net):
    def forward(self, x: Tensor) -> Any:
        print("shape", x.shape)
        return self.logits(x)


class Upset(BaseException):
    """As test runners and schedulers raise."""


def upset() -> nn.Module:
    raise Upset("no [bold]")


def exits() -> nn.Module:
    sys.exit("no licence")


def needs_arguments(width: int) -> nn.Module:
    return Net()


def gives_class() -> Any:
    return Net


def gives_weights() -> Any:
    return Net().state_dict()

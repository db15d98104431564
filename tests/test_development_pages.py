"""The pages for developers: what they name exists, their order is the one that is checked, their examples run."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meansparse_cli.attacks import ATTACKS, runner
from meansparse_cli.attacks.catalogue import AttackSpec
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.data.examples import Examples
from meansparse_cli.models import source

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "meansparse_cli"
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "development").glob("*.md"))}
SOURCES = {path: path.read_text() for path in (*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py"))}
pages = pytest.mark.parametrize("page", PAGES)


def example(page: str, module: str) -> dict[str, Any]:
    """The names that a page's block of Python defines, as the module that it is to be."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": module, "__package__": module.rpartition(".")[0]}
    exec(compile(code, f"{page}.md", "exec"), names)
    return names


@pages
def test_every_file_and_name_exists(page: str) -> None:
    shown = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    text = "\n".join(SOURCES.values())
    for file, name in re.findall(r"`((?:[\w-]+/)*\w+\.(?:py|yaml|toml))(?::([\w.]+))?`", shown):
        found = [path for path in SOURCES if str(path).endswith(f"/{file}")] or [*ROOT.rglob(f"{file}")]
        if page == "architecture" and name:
            found = [PACKAGE / file]
        assert found or file in ("pool.py", "file.py", "tests/test_worst_case.py"), file
        for part in name.split(".") if file != "file.py" and name else ():
            assert re.search(rf"\b{part}\b", SOURCES[found[0]]), f"{file}:{name}"
    for name in re.findall(r"`(_\w+|[A-Z]\w*[a-z]\w*|[A-Z]+_[A-Z]+)(?:\.\w+)?`", shown):
        assert re.search(rf"\b{name}\b", text), name


def test_the_order_of_the_packages_is_the_one_that_is_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [set(layer.split(" : ")) for layer in settings["contracts"][0]["layers"]]
    (drawn,) = re.findall(r"^```\n(cli .*?)^```", PAGES["architecture"], re.MULTILINE | re.DOTALL)
    assert [set(line[:50].split()) for line in drawn.splitlines()] == layers
    assert set.union(*layers) == {path.stem for path in PACKAGE.glob("[!_.]*") if path.stem != "py"}


def test_the_example_of_an_attack_breaks_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"`(AttackSpec\(.*?\))`", PAGES["adding-an-attack"])
    spec = eval(line, {"AttackSpec": AttackSpec})
    monkeypatch.setitem(ATTACKS, spec.name, spec)
    monkeypatch.setitem(
        runner.SEARCHES, spec.search, example("adding-an-attack", "meansparse_cli.attacks.bim")["BIMRule"]
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False))
    with torch.no_grad():  # the sum of the pixels above 4 or below it
        model[1].weight.copy_(torch.stack([torch.ones(8), -torch.ones(8)]))
    x = torch.full((2, 2, 2, 2), 0.1) * torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)
    problem = Problem(nn.Sequential(Shift(0.05), model), Budget("Linf", 0.1), 2, seed=0, batch_size=2)
    result = run_attack(spec.name, problem, Examples(x, torch.zeros(2, dtype=torch.int64), torch.arange(2)))
    assert result.broken.tolist() == [True, False]  # 0.05 and 0.35 from the boundary
    assert result.passes[1].tolist() == [1 + 11, 10]
    assert spec.cost == 11 + 2 * 10


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.by


def test_the_example_of_a_kind_loads_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digits = source.load_model(source.resolve_model("digits"))
    torch.save(digits.state_dict(), tmp_path / "d.pt")
    kind = example("adding-a-model-kind", "meansparse_cli.models.bare")["BareModel"]
    monkeypatch.setattr(source, "KINDS", (kind, *source.KINDS))
    model = source.resolve_model(f"bare:{tmp_path / 'd.pt'}")
    x = torch.rand(3, 1, 8, 8)
    assert (model.kind, model.dataset) == ("bare", "digits")
    assert torch.equal(source.load_model(model)(x), digits(x))


def test_the_example_of_a_test_passes(tmp_path: Path) -> None:
    example("testing", "test_worst_case")["test_what_any_attack_breaks_is_broken_in_the_worst_case"](tmp_path)


def test_every_test_that_answers_a_complaint_exists() -> None:
    rows = re.findall(r"^\| \d+ .*$", PAGES["complaints"], re.MULTILINE)
    assert len(rows) == 25
    for row in rows:
        for file, names in re.findall(r"`(tests/\w+\.py)`: ((?:`\w+`(?:, )?)+)", row):
            text = (ROOT / file).read_text()
            for name in re.findall(r"`(\w+)`", names):
                assert f"def {name}(" in text, (file, name)
        assert "`tests/" in row or "not answered" in row, row

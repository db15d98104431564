"""Every shipped config is loaded for every command it speaks to; those of the headline models are as in the paper."""

from pathlib import Path

import pytest
import yaml

from meansparse_cli.data.facts import KNOWN_DATASETS
from meansparse_cli.models.published_checkpoint import PUBLISHED_FILES
from meansparse_cli.models.source import kind_of, resolve_model
from meansparse_cli.paper.tables import paper_table
from meansparse_cli.settings.commands import SECTIONS
from meansparse_cli.settings.resolve import resolve
from meansparse_cli.settings.values import check_eps

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
HEADLINE = {column.config or "": column.name for column in paper_table("headline").columns}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_usable(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    for command, cls in SECTIONS.items():
        if command == "train" and "train" not in content:
            continue
        settings, sources = resolve(command, cls, file, {})
        given = (set(content) - set(SECTIONS)) | set(content.get(command) or {})
        assert {key for key in given if sources.get(key) == str(file)} == given & set(cls.model_fields)
        if command not in ("fetch", "train"):
            assert settings.model or "train" in content


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_key_has_a_comment(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    bare = [line for line in lines if ": " in line and "#" not in line]
    if file.stem in HEADLINE:
        assert not bare
    else:
        assert len(bare) < len(lines) / 2, bare


@pytest.mark.parametrize("name", HEADLINE)
def test_headline_configs_are_the_papers(name: str) -> None:
    file = next(f for f in CONFIGS if f.stem == name)
    column = paper_table("headline").column(HEADLINE[name])
    cell = column.cells[-1]
    evaluate, _ = resolve("evaluate", SECTIONS["evaluate"], file, {})
    calibrate, _ = resolve("calibrate", SECTIONS["calibrate"], file, {})
    sweep, _ = resolve("sweep-alpha", SECTIONS["sweep-alpha"], file, {})
    source = resolve_model(evaluate.model, evaluate.dataset, evaluate.threat)  # type: ignore[attr-defined]
    assert (source.kind, source.name, source.dataset) == ("zoo", column.model, column.dataset)
    assert source.threat == evaluate.norm == cell.where["norm"]  # type: ignore[attr-defined]
    assert evaluate.eps == cell.where["eps"] == KNOWN_DATASETS[source.dataset].eps[source.threat]  # type: ignore[attr-defined]
    check_eps(evaluate.eps, evaluate.norm)  # type: ignore[attr-defined]
    assert evaluate.n_examples == column.n_examples  # type: ignore[attr-defined]
    assert evaluate.attack == ("standard", "bpda") and calibrate.sites == "published"  # type: ignore[attr-defined]
    assert float(cell.where["alpha"]) in sweep.alphas  # type: ignore[attr-defined]
    # what the comments say: the published alpha and the number of sites
    text = file.read_text()
    files = [f for f in PUBLISHED_FILES if f.is_for(source.entry)]
    measure, _ = resolve("measure", SECTIONS["measure"], file, {})
    assert measure.alphas == (float(cell.where["alpha"]),)  # type: ignore[attr-defined]
    model = kind_of(source)
    assert model.preprocessing(calibrate.preprocessing) == model.preprocessing()  # type: ignore[attr-defined]
    assert f"The authors chose {cell.where['alpha']}," in text and files[0].alpha == float(cell.where["alpha"])
    assert f"the authors' own {files[0].n_sites}:" in text
    before, after = (f"{100 * c.clean:.2f} / {100 * c.robust:.2f}" for c in column.cells)  # type: ignore[operator]
    assert f"{before} -> {after}" in text


def test_the_authors_files_have_the_alphas_of_the_table() -> None:
    found = {
        (column.model, column.dataset, column.cells[-1].where["norm"]): float(column.cells[-1].where["alpha"])
        for column in paper_table("headline").columns
    }
    assert {(file.base, file.dataset, file.threat): file.alpha for file in PUBLISHED_FILES} == found

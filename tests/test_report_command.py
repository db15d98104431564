"""From evaluate with doubts and witnesses to verify and report, on a tiny network, as a user types it."""

import csv
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.diagnostics import search
from meansparse_cli.engine.image_files import WITNESSES_SCHEMA
from meansparse_cli.reporting.render import html_page, markdown, read_run, render, terminal_text
from tests.conftest import said

FACTORY = """
import torch
from torch import nn


class Brightest(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.scale = nn.GELU(), nn.Parameter(torch.tensor(40.0))

    def forward(self, x):
        return self.scale * self.act(x).mean((2, 3))
"""


def meansparse(*arguments: object, width: int = 80) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(width), "NO_COLOR": "1"})


def done(*arguments: object, width: int = 80) -> Result:
    result = meansparse(*arguments, width=width)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with doubts, witnesses and two eps."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = rng.integers(0, 120, (120, 8, 8, 3)).astype(np.uint8)
    x[np.arange(120), :, :, y] += 16  # two budgets of 8/255, give or take the noise
    np.savez(folder / "colours.npz", x=x, y=y)
    (folder / "networks.py").write_text(FACTORY)
    run = folder / "run"
    here = ["--model", f"{folder / 'networks.py'}:Brightest", "--dataset", folder / "colours.npz", "--run", run]
    done("calibrate", *here)
    done("sweep-alpha", *here, "--alphas", "0.2,0.4", "--eps", "8/255", "--max-clean-drop", "100")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "N_STEPS", 20)
        patch.setattr(search, "N_DRAWS", 10)
        attacks = ["--attack", "apgd-ce", "--attack", "bpda-apgd-ce", "--n-doubt-examples", "5"]
        done("evaluate", *here, "--alpha", "0.4", "--eps", "2/255,8/255", *attacks, "--save-witnesses")
    return run


def results(run: Path) -> dict:  # type: ignore[type-arg]
    content = yaml.safe_load((run / "evaluate.yaml").read_text())["results"]
    assert isinstance(content, dict)
    return content


def test_every_doubt_has_a_status_a_number_and_a_source(run: Path) -> None:
    doubts = results(run)["doubts"]
    assert {d["model"] for d in doubts} == {"base", "sparsified"}
    assert len({d["name"] for d in doubts}) == 16
    for doubt in doubts:
        assert doubt["status"] in ("pass", "warn", "too few", "not run")
        assert (doubt["value"] is None) == (doubt["status"] == "not run")
        assert doubt["sentence"] and doubt["source"]
        if doubt["value"] is not None:
            holds = doubt["value"] >= doubt["limit"] if doubt["at_least"] else doubt["value"] <= doubt["limit"]
            assert (doubt["status"] in ("pass", "too few")) == holds


# ---- witnesses


def test_a_witness_for_every_break_and_none_for_others(run: Path) -> None:
    arrays, outcomes = load_file(run / "witnesses.safetensors"), np.load(run / "outcomes.npz")
    assert arrays["evaluated"].tolist() == outcomes["index"].tolist()
    total = 0
    for model in ("base", "sparsified"):
        broken = set(outcomes["index"][outcomes[f"{model}_first_broken_by"] > 0].tolist())
        assert set(arrays[f"{model}.indices"].tolist()) == broken
        assert (
            len(arrays[f"{model}.images"])
            == len(arrays[f"{model}.labels"])
            == len(arrays[f"{model}.found_by"])
            == len(broken)
        )
        total += len(broken)
    assert total > 0


def test_verify_says_that_a_bare_tensor_hides_what_was_not_attacked(run: Path, tmp_path: Path) -> None:
    told = ["--run", run, "--eps", "8/255", "--alpha", "0.4"]
    images = torch.load(run / "witnesses-base.pt", weights_only=True)
    sets = json.loads(done("verify", run / "witnesses-base.pt", *told, "--json").stdout)["results"]["sets"]
    assert sets[0]["n_unchanged"] > 0
    words = said(done("verify", run / "witnesses-base.pt", *told))
    assert f"{sets[0]['n_unchanged']} of the {len(images)} images are the clean ones" in words
    assert "upper bound" in words
    words = said(done("verify", run / "witnesses.safetensors", *told))
    assert "upper bound" not in words  # this file says which examples were attacked
    torch.save(images * 0.99, tmp_path / "moved.pt")
    assert "upper bound" not in said(meansparse("verify", tmp_path / "moved.pt", *told))


def test_a_tensor_of_a_part_of_the_test_set_says_so(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    options = ["--alpha", "0.4", "--eps", "8/255", "--attack", "pgd-20", "--no-doubts", "--save-witnesses", "--fresh"]
    part = done("evaluate", "--run", copy, *options, "--n-examples", "5")
    words = said(part)
    assert "witnesses-base.pt holds the clean image of 7 examples that were not attacked" in words
    assert len(torch.load(copy / "witnesses-base.pt", weights_only=True)) == 12
    whole = done("evaluate", "--run", copy, *options)
    assert "that were not attacked" not in said(whole)


@pytest.mark.parametrize("name", ["witnesses.safetensors", "witnesses-base.pt", "witnesses-sparsified.pt"])
def test_verify_confirms_them_and_arrives_at_the_same_number(name: str, run: Path) -> None:
    told = [] if name.endswith(".safetensors") else ["--eps", "8/255", "--alpha", "0.4"]  # the others do not say
    result = done("verify", run / name, "--run", run, *told)
    report = yaml.safe_load(Path(result.stdout.strip()).read_text())
    worst = results(run)["comparisons"][-1]
    for found in report["results"]["sets"]:
        model = "sparsified" if "sparsified" in name else "base" if "base" in name else found["name"]
        assert found[model]["robust_accuracy"] == worst[f"{model}_accuracy"]
        if name.endswith(".safetensors"):
            assert found[model]["n_misclassified"] == found["n_images"]
    assert max(map(len, result.stderr.splitlines())) <= 120


def test_verify_says_where_it_judges_otherwise_than_a_file_was_found(run: Path, tmp_path: Path) -> None:
    file = run / "witnesses.safetensors"
    result = done("verify", file, "--run", run, "--eps", "16/255", "--alpha", "0.2")
    words = said(result)
    assert "was found at eps 8/255, it is judged at 16/255" in words
    assert "was found with alpha 0.4, it is judged with alpha 0.2" in words
    other = tmp_path / "l2.safetensors"
    save_file(load_file(file), other, metadata={"schema": WITNESSES_SCHEMA, "norm": "L2", "eps": "0.5", "alpha": "0.4"})
    refused = meansparse("verify", other, "--run", run)
    assert (refused.exit_code, "was found under L2" in said(refused)) == (7, True)


def test_verify_says_no_by_its_exit_code(run: Path, tmp_path: Path) -> None:
    images = torch.load(run / "witnesses-base.pt", weights_only=True)
    images[3] = 1 - images[3]
    torch.save(images, tmp_path / "far.pt")
    result = meansparse("verify", tmp_path / "far.pt", "--run", run, "--eps", "8/255", "--alpha", "0.4", "--json")
    assert result.exit_code == 7
    report = json.loads(result.stdout)["results"]
    assert not report["admissible"]
    assert report["sets"][0]["n_outside_budget"] == 1
    torch.save(images[:-1], tmp_path / "short.pt")
    short = meansparse("verify", tmp_path / "short.pt", "--run", run, "--eps", "8/255", "--alpha", "0.4")
    assert short.exit_code == 7
    assert "11 images, the test set has 12" in said(short)
    assert short.stdout == ""


# ---- report


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width: int, run: Path) -> None:
    text = done("report", run, width=width).stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if line.startswith(" worst case"))
    assert "transfer beats white-box attacks" in text  # no name is broken over two lines
    worst = results(run)["comparisons"][-1]
    assert f"{100 * worst['base_accuracy']:.2f} ±" in row
    assert f"{worst['gained']}/{worst['lost']}" in row
    header = next(line for line in lines if "sparsified %" in line)
    assert ("95 % interval" in header) == (width == 120)  # the verdict below the table names it at any width
    assert len(header.rstrip()) <= width


def test_markdown_tables_are_whole_and_carry_the_numbers(run: Path) -> None:
    text = done("report", run, "--format", "markdown").stdout
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    worst = results(run)["comparisons"][-1]
    assert f"| **worst case** | **{100 * worst['base_accuracy']:.2f} ±" in text
    assert results(run)["verdict"] in text


def test_json_is_the_reports(run: Path) -> None:
    content = json.loads(done("report", run, "--format", "json").stdout)
    assert list(content) == ["fetch", "calibrate", "sweep-alpha", "evaluate"]
    assert content["evaluate"] == json.loads(json.dumps(yaml.safe_load((run / "evaluate.yaml").read_text())))


class Links(HTMLParser):
    """Every address a page would load from, and the tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_from_elsewhere(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert done("report", run, "--format", "html", "-o", path).stdout == f"{path}\n"
    page = Links()
    page.feed(text := path.read_text())
    assert len(page.addresses) == 3  # two curves and the gallery
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in text and "url(" not in text
    assert text.count("<table>") == text.count("</table>") >= 4
    assert f"{100 * results(run)['comparisons'][-1]['base_accuracy']:.2f} ±" in text


def test_a_page_escapes_what_it_is_told(run: Path) -> None:
    reports = read_run(run)
    reports["fetch"]["results"]["model"]["name"] = "<script>'a' & \"b\""
    page = html_page(reports, run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;&#x27;a&#x27; &amp; &quot;b&quot;") == 2  # title and heading


def test_a_run_that_has_just_begun_and_one_that_is_not_there(run: Path, tmp_path: Path) -> None:
    (tmp_path / "fetch.yaml").write_bytes((run / "fetch.yaml").read_bytes())
    assert "not evaluated yet" in said(done("report", tmp_path).stdout)
    assert "not evaluated" in done("report", tmp_path, "--format", "html").stdout
    assert meansparse("report", tmp_path / "none").exit_code == 10
    assert meansparse("report", run, "--format", "pdf").exit_code == 3
    edited = (run / "evaluate.yaml").read_text().replace("verdict: ", "verdict: really ", 1)
    (tmp_path / "evaluate.yaml").write_text(edited)
    assert meansparse("report", tmp_path).exit_code == 10


def test_a_report_from_before_doubts_were_a_list(run: Path) -> None:
    reports = read_run(run)
    reports["evaluate"]["results"]["doubts"] = {"claims_rejected": {"base": 0, "sparsified": 0}}
    for text in (terminal_text(reports, 80), markdown(reports), html_page(reports, run)):
        assert "worst case" in text
        assert "Doubts" not in text


def test_a_report_made_from_an_older_one_is_called_outdated(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for form in ("table", "markdown", "html"):
        result = done("report", copy, "--format", form)
        assert "outdated" not in (result.stdout + result.stderr).lower()
    done("calibrate", "--run", copy, "--n-examples", "50", "--fresh")
    sentence = "evaluate.yaml was made from another calibrate.yaml than the one that is here now"
    for form, word in (("table", "OUTDATED: "), ("markdown", "**Outdated: "), ("html", "<b>Outdated:</b> ")):
        result = done("report", copy, "--format", form, width=200)
        assert word + sentence in result.stdout
        assert f"report: {sentence}" in said(result)


def test_a_file_has_no_colours(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    monkeypatch.setenv("TERM", "xterm")
    result = CliRunner().invoke(app, ["report", str(run), "-o", str(tmp_path / "run.txt")])
    assert result.exit_code == 0 and "\x1b" not in (tmp_path / "run.txt").read_text()
    assert "\x1b" in render(run, "table", width=80)


def test_what_was_edited_is_made_again_by_the_command_that_made_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    options = shlex.split("--eps 8/255 --attack pgd-3 --alphas 0.2 --name grid --n-examples 4")
    command = ["measure", "--run", str(copy), *options]
    monkeypatch.setattr("sys.argv", ["meansparse", *command, "--fresh"])
    done(*command)
    file = copy / "measurements" / "grid" / "measure.yaml"
    whole = file.read_text()
    here = copy.rename(tmp_path / "it's $HOME")  # the command is about the folder at hand
    file = here / file.relative_to(copy)
    for text in (whole.replace("alpha: 0.2", "alpha: 0.3"), "["):
        file.write_text(text)
        refused = meansparse("report", file.parent)
        mend = shlex.split(said(refused).split("what is kept: meansparse ")[1])
        assert refused.exit_code == 10 and mend[:3] == ["measure", "--run", str(here)] and "--fresh" not in mend
        assert sorted(mend[3:]) == sorted(options)
        done(*mend)
        assert file.read_text() == whole


def test_named_evaluations_measurements_and_shards_have_a_report(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    options = ["--run", copy, "--eps", "8/255", "--attack", "pgd-3"]
    evaluate = ["evaluate", *options, "--alpha", "0.2", "--no-doubts"]
    done(*evaluate, "--split", "held-out", "--n-examples", "4", "--name", "other")
    done("measure", *options, "--alphas", "0.2", "--name", "grid", "--n-examples", "4")
    shutil.rmtree(copy / "state" / "evaluate")  # shards of another evaluation
    done(*evaluate, "--n-examples", "6", "--shard", "2/3")

    named = copy / "evaluations" / "other"
    text = done("report", named).stdout
    assert text.startswith("networks.py:Brightest, ") or "networks.py:Brightest, " in text.splitlines()[0]
    assert "alpha 0.2, 4 held-out images" in said(text)
    assert "alpha 0.4" not in said(text)  # the sweep and the evaluation of the run itself are not this one's

    measurement = copy / "measurements" / "grid"
    for form in ("table", "markdown", "html"):
        text = said(done("report", measurement, "--format", form).stdout)
        assert "Measurement on 4 test images, plain = pgd-3" in text
        assert "not evaluated" not in text and "verdict:" not in text.lower()
    rows = yaml.safe_load((measurement / "measure.yaml").read_text())["results"]["rows"]
    assert (
        f"| 0.2 | {100 * rows[1]['clean']['accuracy']:.2f} |"
        in done("report", measurement, "--format", "markdown").stdout
    )

    shard = said(done("report", copy / "shards" / "shard-2-of-3").stdout)
    assert "2 test images (shard 2/3)" in shard
    words = said(done("report", copy))
    assert f"beside it: meansparse report {named} beside it: meansparse report {measurement}" in words


def test_a_line_an_example(run: Path, tmp_path: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(done("report", run, "--format", "csv").stdout)))
    outcomes = np.load(run / "outcomes.npz")
    assert [int(line["index"]) for line in lines] == outcomes["index"].tolist()
    for model in ("base", "sparsified"):
        n_robust = sum(line[f"{model} first_broken_by"] == "robust" for line in lines)
        assert n_robust == (outcomes[f"{model}_first_broken_by"] < 0).sum()
        for k, name in enumerate(outcomes["name"]):
            codes = [int(line[f"{model} broken_by {name}"] or -1) for line in lines]
            assert codes == outcomes[f"{model}_outcome"][:, k].tolist()
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "outcomes.npz").write_bytes(b"")
    assert meansparse("report", damaged, "--format", "csv").exit_code == 10
    (damaged / "evaluate.yaml").unlink()
    nothing = meansparse("report", damaged, "--format", "csv")
    assert nothing.exit_code == 3 and "meansparse evaluate --run" in said(nothing)


def test_the_gallery_is_part_of_the_page(run: Path, tmp_path: Path) -> None:
    page = done("report", run, "--format", "html").stdout
    assert (run / "gallery.png").stat().st_size > 1000 and "The first examples that were broken" in page
    without = tmp_path / "run"
    shutil.copytree(run, without)
    (without / "gallery.svg").unlink()
    assert "The first examples that were broken" not in done("report", without, "--format", "html").stdout


def test_a_card_for_the_hub(run: Path, tmp_path: Path) -> None:
    path = done("export", run, tmp_path / "README.md", "--hub-card", "--alpha", "0.4", "--allow-code").stdout.strip()
    _, front, text = Path(path).read_text().split("---\n", 2)
    header = yaml.safe_load(front)
    figures = {one["name"]: one["value"] for one in header["model-index"][0]["results"][0]["metrics"]}
    shown = {row["name"]: round(100 * row["sparsified_accuracy"], 2) for row in results(run)["comparisons"]}
    assert figures == shown and "load_sparsified(" in text and "Verdict: " in text
    refused = meansparse("export", run, "--hub-card", "--alpha", "0.2", "--allow-code")
    assert refused.exit_code == 10 and "--alpha 0.4" in said(refused)


def test_each_number_of_a_page_has_an_address_of_its_own() -> None:
    page = (Path(__file__).parent / "golden" / "done" / "digits" / "page.html").read_text()
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 30
    assert {"gain", "survival", "masked", "provenance.evaluate"} <= set(ids)
    assert "accuracy-standard-error-gains.worst-case" in ids and "attacks-in-the-order.bpda-apgd-ce" in ids
    assert "evaluate --save-witnesses" in page  # it has no gallery

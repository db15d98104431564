import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meansparse_cli.errors import ConfigError
from meansparse_cli.runs.device import batch_size_on
from meansparse_cli.settings.commands import COMMANDS, SECTIONS, Command
from meansparse_cli.settings.resolve import resolve
from meansparse_cli.settings.stages import CalibrateConfig, EvaluateConfig, SweepAlphaConfig
from meansparse_cli.settings.values import check_eps, eps_value, parse_alphas

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_flags_win_over_yaml_over_default(tmp_path: Path) -> None:
    file = written(tmp_path, "model: digits\nseed: 3\nbatch_size: 64\nsweep-alpha:\n  seed: 4\n")
    config, sources = resolve("sweep-alpha", SweepAlphaConfig, file, {"batch_size": 8, "seed": None})
    assert (config.model, config.seed, config.batch_size, config.max_clean_drop) == ("digits", 4, 8, 0.5)
    assert [sources[k] for k in ("batch_size", "seed", "max_clean_drop")] == ["flag", str(file), "default"]
    other, _ = resolve("evaluate", EvaluateConfig, file, {})
    assert (other.seed, other.batch_size) == (3, 64)


def test_a_file_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEANSPARSE_DATA", "/of/the/shell")
    file = tmp_path / "c.yaml"
    file.write_text("data_dir: /of/the/file\n")
    for given, flag, expected, source in (
        (None, None, "/of/the/shell", "MEANSPARSE_DATA"),
        (file, None, "/of/the/file", str(file)),
        (file, "/typed", "/typed", "flag"),
    ):
        config, sources = resolve("calibrate", CalibrateConfig, given, {"data_dir": flag})
        assert (str(config.data_dir), sources["data_dir"]) == (expected, source)


def test_zero_and_false_can_be_set(tmp_path: Path) -> None:
    file = written(tmp_path, "seed: 7\nmax_clean_drop: 2\n")
    config, _ = resolve("sweep-alpha", SweepAlphaConfig, file, {"seed": 0, "max_clean_drop": 0.0})
    assert (config.seed, config.max_clean_drop) == (0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "did you mean batch_size"),
        ("sweep-alfa: {}", "did you mean sweep-alpha"),
        ("calibrate: {alphas: '0.1'}", "section calibrate: unknown key 'alphas'"),
        ("calibrate: 3", "expected keys and values"),
        ("- a\n- b", "expected keys and values"),
        ("a: [1", "is not YAML"),
        ("batch_size: 0", "expected auto, or a number of images from 1 on"),
        ("estimator: exact", "'pooled' or 'published'"),
    ],
)
def test_bad_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("calibrate", SECTIONS["calibrate"], written(tmp_path, text), {})
    assert message in str(caught.value)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_every_shipped_config_is_valid(file: Path) -> None:
    for command, cls in SECTIONS.items():
        if command != "train":
            resolve(command, cls, file, {})
    keys = [
        line.split(":")[0].strip()
        for line in file.read_text().splitlines()
        if ":" in line and not line.lstrip().startswith("#")
    ]
    assert keys
    assert yaml.safe_load(file.read_text())


def test_there_is_a_shipped_config() -> None:
    assert CONFIGS


def test_alphas() -> None:
    assert parse_alphas("0.05:0.2:0.05") == (0.05, 0.1, 0.15, 0.2)
    assert parse_alphas("0.3, 0.1") == (0.3, 0.1)
    assert parse_alphas([0, 0.25]) == (0.0, 0.25)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "0.5:0.1:0.1",
        "0.1:0.5:0",
        "0.1:0.5",
        "-0.1",
        "nan",
        "inf",
        "0.1,x",
        "nan:1:0.1",
        "0:inf:0.1",
        "0:10000:0.0001",
    ],
)
def test_bad_alphas(text: str) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        resolve("sweep-alpha", SweepAlphaConfig, None, {"alphas": text})


def test_eps() -> None:
    assert eps_value("8/255") == 8 / 255
    config, _ = resolve("evaluate", EvaluateConfig, None, {"eps": "8/255"})
    assert config.eps == "8/255"
    with pytest.raises(ConfigError) as caught:
        check_eps("8", "Linf")
    assert "did you mean --eps 8/255?" in str(caught.value)
    check_eps("1.5", "L2")


@pytest.mark.parametrize("text", ["0", "-1/255", "8/0", "eight", "nan:1:0.1", "1/255:1:1/255000"])
def test_bad_eps(text: str) -> None:
    with pytest.raises(ConfigError, match="eps"):
        resolve("evaluate", EvaluateConfig, None, {"eps": text})


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_option_is_declared_once_with_its_help(command: Command) -> None:
    fields, told = command.settings.model_fields, command.arguments.model_fields
    assert not fields.keys() & told.keys()
    assert len(set(command.options)) == len(command.options)
    assert {*command.options} <= {*fields, *told} and all(command.shown[name]["help"] for name in command.options)
    assert {*fields, *told} <= {name for other in COMMANDS.values() for name in other.shown}


def test_no_option_is_described_that_no_command_has() -> None:
    described = {name for command in COMMANDS.values() for name in command.shown}
    assert described == {name for command in COMMANDS.values() for name in command.options}


def test_settings_are_read_without_torch() -> None:
    code = "import sys, meansparse_cli.settings.resolve; assert not {'torch', 'typer', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_batch_size_is_the_machines_unless_it_is_given() -> None:
    assert (batch_size_on("cpu"), batch_size_on("cuda:1")) == (256, 1024)
    assert [EvaluateConfig(batch_size=given).batch_size for given in ("auto", "AUTO", "7", 7)] == [
        "auto",
        "auto",
        7,
        7,
    ]  # type: ignore[arg-type]

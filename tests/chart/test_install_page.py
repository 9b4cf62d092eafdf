"""docs/install.md: its values are values, and what it has one apply renders as it says."""

import re
from pathlib import Path

import yaml
from chart_release import CHART, ROOT, Helm
from chart_values import values

PAGE = (ROOT / "docs/install.md").read_text()
FILES = dict(re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def test_the_values_that_it_names_are_values() -> None:
    paths = {each.path for each in values((CHART / "values.yaml").read_text())}
    tables = " ".join(line.partition("|")[2] for line in PAGE.splitlines() if line.startswith("| "))
    top = {path.partition(".")[0] for path in paths}
    named = [
        name
        for name in re.findall(r"`([a-zA-Z]+(?:\.[a-zA-Z*]+)*)(?:[=:][^`]*)?`", PAGE + tables)
        if name.partition(".")[0] in top
    ]
    assert len(named) > 10
    for name in named:
        stem = name.removesuffix(".*")
        assert any(path == stem or path.startswith(f"{stem}.") for path in paths), name


def test_every_values_file_of_its_commands_is_on_it_and_renders(helm: Helm, tmp_path: Path) -> None:
    used = re.findall(r"--values (\S+)", PAGE)
    assert set(used) == set(FILES)
    for name, text in FILES.items():
        file = tmp_path / name
        file.write_text(text)
        assert "0 chart(s) failed" in helm.run("lint", "--strict", str(CHART), f"--values={file}")
        kinds = {each["kind"] for each in helm.template(file)} - {each["kind"] for each in helm.template()}
        assert (
            kinds
            == {
                "fleets.yaml": {"NetworkPolicy"},
                "monitored.yaml": {"ServiceMonitor", "PrometheusRule", "ConfigMap"},
            }[name]
        )


def test_its_helm_commands_are_about_this_chart_and_one_release() -> None:
    commands = re.findall(r"^helm (\S+) (\S+) (\S+)", PAGE, re.MULTILINE)
    assert {release for _, release, _ in commands} == {"weightsync"}
    assert {chart for _, _, chart in commands} == {"charts/weightsync"}
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["name"] == "weightsync"

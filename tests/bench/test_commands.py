"""The commands from end to end on a made-up GPU: what they print, write and return."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import bench
from bench.commands import cpu, files, measure
from bench.commands.files import Outputs
from bench.commands.measure import Request
from bench.record.file import Record
from bench.record.rows import HostRow
from bench.runner import Options
from tests.bench.simulated import SimulatedClock, SimulatedGpu
from tests.bench.test_runner import Off
from tritonnorm.device import KNOWN

REQUEST = Request(
    "resnet50",
    modes=["forward+backward", "inference"],
    layouts=["NHWC"],
    batches=[1],
    providers=["tritonnorm", "eager", "apex"],
    options=Options(rounds=30),
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of two channels: the interpreter computes them; and roofs of a megabyte."""
    from bench import layers, session, suites
    from bench.roofs import measured_roofs

    tiny = (layers.Layer(2, (4, 4)), layers.Layer(4, (2, 2), residual=True))
    monkeypatch.setattr(suites, "NETWORKS", {"resnet50": tiny})
    monkeypatch.setattr(
        session, "measured_roofs", lambda machine: measured_roofs(machine, least=1 << 20)
    )


def console() -> Console:
    return Console(width=200, file=io.StringIO())


def text(of: Console) -> str:
    return of.file.getvalue()


def test_run_prints_and_writes_everything(tmp_path: Path) -> None:
    out, outputs = console(), Outputs.all_in(tmp_path / "new" / "folder")
    assert measure.run(out, REQUEST, outputs, SimulatedGpu()) == 0
    printed = text(out)
    for part in ("Simulated GPU", "BN+add+relu", "forward+backward", "apex", "(formula)"):
        assert part in printed
    record = Record.read(outputs.json)
    assert len(record.ops) == 2 * 2 * 2 and record.environment["gpu"]["name"] == "Simulated GPU"
    frame = bench.load(outputs.json)
    assert list(frame["provider"].unique()) == ["tritonnorm", "eager"]
    assert frame["gb_s"].tolist() == [row.gb_s for row in record.ops]
    assert outputs.html.read_text(encoding="utf-8").count("<table") >= 2
    assert "| BN+relu |" in outputs.md.read_text(encoding="utf-8")
    assert outputs.csv.read_text(encoding="utf-8").startswith("op,mode,layout")
    assert len(list(outputs.pictures.glob("*.png"))) >= 3


def test_a_wrong_kernel_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    off = Off("y")
    off.name = "tritonnorm"
    monkeypatch.setattr(measure, "select", lambda names: [off])
    out = console()
    assert measure.run(out, REQUEST, machine=SimulatedGpu()) == 1
    assert "FAILED tritonnorm BN+relu" in text(out) and "wrong y" in text(out)


def test_the_limit_ends_it_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    out = console()
    assert measure.run(out, replace(REQUEST, limit=0.0), machine=SimulatedGpu()) == 0
    assert "the limit of 0 s was over" in text(out)


def test_an_interrupted_run_leaves_what_it_had(tmp_path: Path) -> None:
    class Interrupted(SimulatedClock):
        def prepare(self, calls):
            if len(self.sets) == 5:  # two roofs, then the first case by two providers
                raise KeyboardInterrupt
            return super().prepare(calls)

    path = tmp_path / "run.json"
    with pytest.raises(KeyboardInterrupt):
        measure.run(console(), REQUEST, Outputs(json=path), SimulatedGpu(clock=Interrupted()))
    assert [row.provider for row in Record.read(path).ops] == ["tritonnorm", "eager"]


def test_compare_two_runs(tmp_path: Path) -> None:
    paths = []
    for name, share in (("base", 0.9), ("slower", 0.5)):
        clock = SimulatedClock(shares={"tritonnorm": share, "eager": 0.4})
        paths.append(tmp_path / f"{name}.json")
        # Slower by shares of the bandwidth, not of launches: larger tensors.
        request = replace(REQUEST, batches=[4096], providers=["eager", "tritonnorm"])
        request = replace(request, modes=["inference"])
        measure.run(console(), request, Outputs(json=paths[-1]), SimulatedGpu(clock=clock))
    base, slower = paths
    out = console()
    assert files.compare(out, base, slower) == 1 and "SLOW" in text(out)
    assert files.compare(console(), slower, base) == 0
    assert files.compare(console(), base, base) == 0
    other = Record.read(base)
    other.environment["gpu"]["name"] = "Another GPU"
    other.save(tmp_path / "other.json")
    with pytest.raises(ValueError, match="Another GPU"):
        files.compare(console(), base, tmp_path / "other.json")
    assert files.compare(console(), base, tmp_path / "other.json", force=True) == 0


def test_show(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    measure.run(console(), REQUEST, Outputs(json=path), SimulatedGpu())
    out = console()
    assert files.show(out, path, Outputs(md=tmp_path / "run.md")) == 0
    assert "Simulated GPU" in text(out) and (tmp_path / "run.md").exists()
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not a results file"):
        files.show(console(), path)


def test_submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run.json"
    measure.run(console(), REQUEST, Outputs(json=run), SimulatedGpu())
    record = Record.read(run)
    record.environment["dirty"] = False
    record.save(run)
    results = tmp_path / "results"
    out = console()
    assert measure.submit(out, source=run, results=results) == 0
    path = results / "simulated_gpu" / f"{record.environment['date']}.json"
    assert Record.read(path) == record and "pull request" in text(out)
    with pytest.raises(FileExistsError, match="is there already"):
        measure.submit(console(), source=run, results=results)
    record.environment["dirty"] = True
    record.save(run)
    with pytest.raises(ValueError, match="changes that are not committed"):
        measure.submit(console(), source=run, results=tmp_path / "elsewhere")
    record.ops.clear()
    record.save(run)
    with pytest.raises(ValueError, match="expected operations measured on a GPU"):
        measure.submit(console(), source=run, results=tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_the_roofline_goes_over_sizes(tmp_path: Path) -> None:
    out = console()
    gpu = SimulatedGpu(facts=replace(KNOWN["h200"], l2_bytes=1 << 20))
    assert measure.roofline(out, Outputs(json=tmp_path / "roofs.json"), gpu) == 0
    roofs = Record.read(tmp_path / "roofs.json").frame("roofs")
    assert set(roofs["kind"]) == {"theoretical", "copy", "read"}
    copies = roofs[roofs["kind"] == "copy"]["bytes"].tolist()
    assert copies == sorted(set(copies)) and len(copies) == 6
    assert copies[0] < (1 << 20) / 4 and copies[-1] == 2 * 8 * (1 << 20)


def test_the_host_rows_make_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = HostRow("import", "tritonnorm", 10.0, 9.0, 11.0, 7)
    asked: list[str] = []

    def run_jobs(jobs, progress, at_once):
        asked.extend(job.name for job in jobs)
        assert at_once == 1
        return [[row], [], []]

    monkeypatch.setattr(cpu, "run_jobs", run_jobs)
    out = console()
    assert cpu.host(out, Outputs(json=tmp_path / "host.json")) == 0
    assert asked == ["imports", "calls", "folding"]
    assert Record.read(tmp_path / "host.json").host == [row]
    assert json.loads((tmp_path / "host.json").read_text())["environment"]["gpu"]["name"] == "none"
    monkeypatch.setattr(cpu, "audit", lambda console, quick, processes: 1)
    monkeypatch.setattr(cpu, "BENCH", tmp_path)
    assert cpu.without_gpu(out) == 1  # a fault in the audit is one of the command
    assert "need a GPU" in text(out) and (tmp_path / "out" / "cpu" / "bench.html").exists()


def test_slugs() -> None:
    assert measure.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    assert measure.slug("AMD Instinct MI300X") == "amd_instinct_mi300x"

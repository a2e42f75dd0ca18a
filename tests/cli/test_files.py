"""Files are written whole or not at all, and errors name them."""

import errno
import os
import stat
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import glcan_fx
from glcan_fx.cli import main as cli
from glcan_fx.files import replacing, write

OLD, NEW = "what was there", "x" * 200_000


@contextmanager
def limit(count: int):
    """No file may become larger than ``count`` bytes, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))  # Python ignores the signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [NEW, NEW.encode()])
def test_a_file_is_written(tmp_path, content):
    path = tmp_path / "plan.json"
    write(path, content)
    write(str(path), content)
    assert path.read_text() == NEW and names(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("room", [0, 1000, 150_000])
def test_a_full_disk_leaves_what_was_there(tmp_path, room):
    path = tmp_path / "plan.json"
    path.write_text(OLD)
    with limit(room), pytest.raises(OSError, match=r"make room.*plan\.json") as caught:
        write(path, NEW)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert path.read_text() == OLD and names(tmp_path) == ["plan.json"]


def test_a_disk_that_is_really_full(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        (folder / "plan.json").write_text(OLD)
        with pytest.raises(OSError, match=r"No space left.*make room.*plan\.json") as caught:
            write(folder / "plan.json", NEW)
        assert caught.value.errno == errno.ENOSPC
        assert (folder / "plan.json").read_text() == OLD and names(folder) == ["plan.json"]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_checkpoint_on_a_full_disk(tmp_path):
    """torch speaks of a failed write in words of its own."""
    path = tmp_path / "checkpoint.pt"
    path.write_text(OLD)
    with limit(50_000), pytest.raises(OSError, match=r"make room.*checkpoint\.pt"), replacing(path) as file:
        torch.save(torch.zeros(100_000), file)
    assert path.read_text() == OLD and names(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_an_interruption_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "plan.json"
    path.write_text(OLD)

    def stopped() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise error("mine")

    with pytest.raises(error, match="^mine$"):
        stopped()
    assert path.read_text() == OLD and names(tmp_path) == ["plan.json"]


def test_what_is_there_is_replaced_last(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(OLD)
    with replacing(path) as file:
        file.write(NEW.encode())
        file.flush()
        assert path.read_text() == OLD
    assert path.read_text() == NEW


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make the folder first.*nowhere/plan\.json"):
        write(tmp_path / "nowhere" / "plan.json", NEW)
    with pytest.raises(IsADirectoryError, match="test_a_folder"):
        write(tmp_path, NEW)


@contextmanager
def nobody():
    """Root may write everywhere, so as another user."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_may_not_be_written(what):
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        folder, path = Path(name), Path(name) / "plan.json"
        path.write_text(OLD)
        path.chmod(0o666 if what == "folder" else 0o444)
        folder.chmod(0o555 if what == "folder" else 0o777)
        with nobody(), pytest.raises(PermissionError, match=r"change the permissions.*plan\.json") as caught:
            write(path, NEW)
        folder.chmod(0o777)
        assert caught.value.filename == str(path)
        assert path.read_text() == OLD and names(folder) == ["plan.json"]


def test_links_stay_links(tmp_path):
    (tmp_path / "a").mkdir()
    target, link = tmp_path / "a" / "real.json", tmp_path / "link.json"
    target.write_text(OLD)
    link.symlink_to("a/real.json")
    write(link, NEW)
    assert link.is_symlink() and target.read_text() == NEW and names(tmp_path / "a") == ["real.json"]
    target.unlink()
    write(link, NEW)  # one that leads nowhere makes its file, as open() does
    assert link.is_symlink() and target.read_text() == NEW


def test_permissions_are_those_of_a_plain_write(tmp_path):
    path, plain = tmp_path / "plan.json", tmp_path / "plain"
    before = os.umask(0o027)
    try:
        write(path, NEW)
        plain.write_text(NEW)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode) == 0o640
        path.chmod(0o664)
        write(path, NEW)
        assert stat.S_IMODE(path.stat().st_mode) == 0o664
    finally:
        os.umask(before)


def test_pipes_are_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        write(pipe, OLD)
        assert reader.communicate()[0] == OLD
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_long_name(tmp_path):
    write(tmp_path / ("n" * 255), NEW)


# ------------------------------------------------------------ who writes


@pytest.fixture(scope="module")
def plan() -> glcan_fx.Plan:
    net = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.ReLU())
                                for _ in range(3)), torch.nn.Flatten(), torch.nn.Linear(192, 5))
    return glcan_fx.plan(net, k=2, task="classification", example_inputs=torch.empty(2, 3, 8, 8))


@pytest.mark.parametrize("ending", ["json", "html", "txt", "dot"])
def test_plans_on_a_full_disk(tmp_path, plan, ending):
    path = tmp_path / f"plan.{ending}"
    path.write_text(OLD)
    with limit(100), pytest.raises(OSError, match=rf"make room.*plan\.{ending}"):
        plan.save(path)
    assert path.read_text() == OLD and names(tmp_path) == [path.name]
    plan.save(path)
    assert len(path.read_text()) > 100


def test_the_command_line_names_the_file(tmp_path, capsys):
    model, path = tmp_path / "model.py", tmp_path / "plan.json"
    model.write_text("from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), "
                     "nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))\n")
    path.write_text(OLD)
    arguments = ["inspect", f"{model}:build", "--input", "2x3x8x8", "--task", "classification", "-o", str(path)]
    with limit(100):
        assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "make room" in error and str(path) in error and "Traceback" not in error
    assert path.read_text() == OLD


def test_records_and_pictures_on_a_full_disk(tmp_path):
    from matplotlib.figure import Figure

    from glcan_fx.demo import report as demo_report
    from glcan_fx.files import write_figure

    written = {"results.json": lambda path: demo_report.write_results(path, [], options="b" * 500),
               "curves.png": lambda path: write_figure(path, Figure()),
               "curves.svg": lambda path: write_figure(path, Figure())}
    for name, make in written.items():
        folder = tmp_path / name
        folder.mkdir()
        path = folder / name
        path.write_text(OLD)
        with limit(100), pytest.raises(OSError, match=f"make room.*{name}"):
            make(path)
        assert path.read_text() == OLD and names(folder) == [name]
        make(path)
        assert path.stat().st_size > 100


def test_a_training_program_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import training

    net = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    state = training._State(tmp_path, net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), {"a": 1})
    state.save()
    state.note({"step": 1, "loss": "x" * 2000})
    state.step = 7
    for action in (state.save, lambda: state.note({"step": 2})):
        with limit(1000), pytest.raises(OSError, match="make room"):
            action()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=False)["step"] == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert names(tmp_path) == ["checkpoint.pt", "metrics.jsonl"]

"""Runs in people's hands: bad commands, kills, signals, several processes."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import data
import model as M
import train
from test_msd import GPUS, HERE, command, run, run_here, script, tiny, torchrun, write
from tests.test_checkpoints import edit
from tools import checkpoints


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--presets", "demo"], "unrecognized arguments: --presets demo; did you mean --preset?"),
        (["--preset", "minlm"], "argument --preset: invalid choice: 'minlm'"),
        (["--stages", "5"], "argument --stages: '5': expected stages 1 to 4"),
        (["--stages", "2-4"], "needs --assistant"),
        (["--stages", "2", "--bottleneck", "0"], "needs a bottleneck"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--epochs", "1,2"], "one value, or 4 with commas"),
        (["--init", "svdd"], "argument --init: invalid choice: 'svdd'"),
        (["--train", "nowhere*.tsv", "--teacher", "x"], "--train nowhere*.tsv: no such file"),
        (["--teacher", "x"], "needs both"),
        (["--dropout", "1.5"], "1.5: expected 0 or more, less than 1"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--layers", "0"], "argument --layers: '0': expected 1 or more"),
        (["--layers", "2000000000"], "argument --layers: '2000000000': expected 1 or more"),
        (["--layers", "1,,"], "argument --layers: invalid layer_list value: '1,,'"),
        (["--device", "nonsense"], "is not usable here"),
        (["--device", "mps"], "is not usable here"),
        (["--layers", "9"], "--layers 9: expected 1 to 4"),
        (["--stages", "2-4", "--assistant", "nowhere"], "nowhere: no such model directory"),
    ],
)
def test_bad_commands(flags, message, tmp_path):
    done = run(
        [
            sys.executable,
            HERE / "train.py",
            "--out",
            tmp_path / "run",
            "--cache",
            tmp_path / "cache",
            *flags,
        ]
    )
    assert (
        done.returncode == 2
        and message in done.stderr
        and done.stderr.count("\n") == 1
        and not list(tmp_path.glob("run/*/"))
        and not (tmp_path / "run" / "run.json").exists()
    )


def test_a_run_is_known_by_its_content(world, finished, tmp_path, capsys):
    """Data that moved is the same; a file that changed is not, nor is a damaged table shown."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(world / "whole", out)
    for folder in ("d", "teacher"):
        shutil.copytree(world / folder, moved / folder)
    args = command(moved, out)
    assert "this run is finished" in run_here(capsys, args)
    write(out / "results.json", "{}")
    with pytest.raises(M.InputError, match="not a run's results.*delete it"):
        run_here(capsys, args)
    with open(moved / "d" / "en-de.tsv", "a", encoding="utf-8") as f:
        f.write("a new pair\tein neues Paar\n")
    with pytest.raises(
        M.InputError, match="started with (dev|train) .*, now .* Give the old value"
    ):
        run_here(capsys, args)
    edit(out / "run.json", check_update=True)  # a flag of an older revision
    with pytest.raises(M.InputError, match="check_update True, now it is None. Take the revision"):
        run_here(capsys, args)


def test_a_model_that_a_faster_process_built(world, finished, tmp_path):
    place, folder = train.Run(train.parse(command(world, tmp_path)[2:])), tmp_path / "student"

    def slow():
        shutil.copytree(world / "whole" / "student", folder)
        return M.load(world / "whole" / "assistant")

    assert place.build(folder, slow) == folder
    assert checkpoints.fingerprint(folder) == checkpoints.fingerprint(world / "whole" / "student")


def test_widths_must_match(world, tokenizer, tmp_path):
    tiny(tokenizer, hidden_size=16).save(tmp_path / "narrow")
    done = run(command(world, tmp_path / "run", "--assistant", tmp_path / "narrow"))
    assert done.returncode == 2 and "the widths must match" in done.stderr


def test_keep_vocab_of_a_run(world, finished, tmp_path, capsys):
    """A cut assistant as it is, without stage 1: the run leaves it; bad sizes stop at once."""
    given = world / "whole" / "assistant"
    pieces = len(M.load(given).tokenizer.get_vocab())
    flags = ["--stages", "4", "--assistant", given, "--keep-vocab"]
    told = run_here(capsys, command(world, tmp_path / "run", *flags, pieces - 40))
    assert "of dev en-de" in told and "assistant, given" in told
    cut, student = (M.load(tmp_path / "run" / x) for x in ("assistant", "student"))
    assert cut.config.vocab_size == student.config.vocab_size == pieces - 40
    for bad, message in (
        (flags + [2], "--keep-vocab 2: expected"),
        (["--keep-vocab", 99], "needs"),
    ):
        with pytest.raises(M.InputError, match=message):
            run_here(capsys, command(world, tmp_path / "bad", *bad))
        assert not (tmp_path / "bad" / "run.json").exists()


def test_other_systems(world, tmp_path):
    """What Windows and macOS lack is taken away; four stages run all the same."""
    write(
        tmp_path / "without" / "sitecustomize.py",
        """
import ctypes, os, pathlib, shutil, sys
import numpy, torch  # they ask os.uname on Linux themselves
for name in ("posix_fallocate", "uname", "fork"):
    vars(os).pop(name, None)
for name in ("fcntl", "resource"):
    sys.modules[name] = None
def refuse(*a, **k):
    raise TypeError("LoadLibrary() argument 1 must be str, not None")
ctypes.CDLL = refuse
shutil._use_fd_functions = False  # as there
real = os.open
def no_folders(path, flags, *a, **k):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real(path, flags, *a, **k)
os.open = no_folders
there = pathlib.Path.exists
pathlib.Path.exists = lambda self, **k: not str(self).startswith("/proc") and there(self, **k)
""",
    )
    environment = {
        "PYTHONPATH": str(tmp_path / "without"),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    text = "import locale, os; print(locale.getencoding(), hasattr(os, 'uname'))"
    check = run([sys.executable, "-c", text], **environment)
    assert check.stdout.split()[1] == "False" and "UTF" not in check.stdout
    done = run(command(world, tmp_path / "run", "--cache", tmp_path / "cache"), **environment)
    assert done.returncode == 0, done.stderr
    assert "student, stage 4" in done.stdout
    found = run(
        [sys.executable, "-m", "tools", "similarity", tmp_path / "run" / "student", "a", "b"],
        **environment,
    )
    assert found.returncode == 0, found.stderr


def test_killed_at_random_moments(world, finished):
    """kill -9 some moment after a checkpoint has changed, continue, until done: the bits of a run
    that was never stopped."""
    rng, kills, file = random.Random(0), 0, world / "killed" / "checkpoint.safetensors"
    often = script(world / "often.py", "train.SAVE_SECONDS = 0")
    stamp = lambda: file.stat().st_mtime_ns if file.exists() else 0
    for _ in range(60):
        before = stamp()
        p = subprocess.Popen(
            command(world, world / "killed", script=often),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while kills < 4 and p.poll() is None and stamp() == before:
            time.sleep(0.002)
        try:
            p.wait(timeout=rng.uniform(0, 0.3) if kills < 4 else 100)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
            kills += 1
            continue
        assert p.returncode == 0, p.stderr.read().decode()
        break
    assert kills >= 2
    assert (world / "killed" / "student" / "model.safetensors").read_bytes() == (
        world / "whole" / "student" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave(world, finished, number, code):
    out = world / f"signal{code}"
    p = subprocess.Popen(
        command(world, out, "--epochs", "300"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "stage 1, " not in p.stdout.readline():
        assert p.poll() is None, p.stderr.read()
    while '"stage": "stage 1", "step"' not in (out / "log.jsonl").read_text("utf-8"):
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.05)
    p.send_signal(number)
    said, _ = p.communicate(timeout=60)
    assert p.returncode == code and "stopped; the same command continues here" in said
    assert int(M.read_safetensors(out / "checkpoint.safetensors")[1]["step"]) > 0
    changed = run(command(world, out, "--epochs", "300", "--lr", "0.5"))
    assert changed.returncode == 2 and "started with lr [0.002," in changed.stderr
    assert "choose another --out" in changed.stderr


def test_a_damaged_checkpoint(world, finished, tmp_path, capsys):
    shutil.copytree(world / "whole", out := tmp_path / "out")
    for name in ("results.json", "student"):
        data.delete(out / name)
    write(out / "checkpoint.safetensors", b"x" * 100)
    with pytest.raises(M.InputError, match="valid safetensors file: .*; delete it to redo stage 4"):
        run_here(capsys, command(world, out))


def test_processes_share_a_run(world, finished, tmp_path):
    """One process killed: the other ends, too; the same command continues to the table; the
    log is written once."""
    file = script(
        tmp_path / "dies.py",
        """
train.SAVE_SECONDS = 0
real = train.stage_batches
def fragile(run, stage, *rest):
    loss_at, steps = real(run, stage, *rest)
    def at(step):
        if run.rank == 1 and stage == 3 and step == 4 and len(rest) == 5:  # not for dev
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_at(step)
    return at, steps
train.stage_batches = fragile
""",
    )
    flags = "--dtype float32 --device cpu --epochs 1".split()
    done = run(torchrun(command(world, tmp_path / "run", *flags, script=file)))
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert M.read_safetensors(tmp_path / "run" / "checkpoint.safetensors")[1] | {
        "best": "",
        "seconds": "",
    } == {"format": "pt", "stage": "stage 3", "step": "4", "best": "", "seconds": ""}
    done = run(torchrun(command(world, tmp_path / "run", *flags)))
    assert (
        done.returncode == 0
        and done.stdout.count("student, stage 4") == 3
        and "stage 3: continues at step 4" in done.stdout
    ), done.stderr
    log = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [(e["stage"], e["step"]) for e in log if "loss" in e]
    assert len(steps) == len(set(steps)) == 4 * 8


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU here")
def test_four_stages_on_a_gpu(world, tmp_path):
    done = run(command(world, tmp_path / "run", "--device", "cuda"), CUDA_VISIBLE_DEVICES=GPUS)
    assert done.returncode == 0 and "student, stage 4" in done.stdout, done.stderr
    tools = [sys.executable, "-m", "tools", "similarity", tmp_path / "run" / "student"]
    assert run([*tools, "a", "b"], CUDA_VISIBLE_DEVICES=GPUS).returncode == 0


def test_table_again_without_the_stages(world, finished, tmp_path, capsys):
    """results.json deleted: it is written again from the models that are kept, and none trained."""
    place = tmp_path / "run"
    run_here(capsys, command(world, place))
    first = json.loads((place / "results.json").read_text())["rows"]
    (place / "results.json").unlink()
    assert "stage 1, " not in run_here(capsys, command(world, place))
    again = json.loads((place / "results.json").read_text())["rows"]
    assert set(again) == {"teacher", "assistant", "student, stage 4"}
    assert again["student, stage 4"] == first["student, stage 4"]
    (place / "results.json").unlink()
    shutil.rmtree(place / "assistant")
    with pytest.raises(M.InputError, match="assistant: no such model directory"):
        run_here(capsys, command(world, place))
    assert not (place / "results.json").exists()

"""Runs in people's hands: bad commands, kills, signals, several processes."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import model as M
import msd
import train
from test_msd import GPUS, HERE, command, run, run_here, script, tiny, torchrun, write
from tests.test_checkpoints import edit
from tools import checkpoints, cli, evaluation, export


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
        (["--layers", "0"], "argument --layers: '0': expected layers as 3 (the first three)"),
        (["--layers", "99999999999"], "argument --layers: '99999999999': expected layers as 3"),
        (["--layers", ","], "argument --layers: ',': expected layers as 3"),
        (["--layers", "1,,"], "argument --layers: '1,,': expected layers as 3"),
        (["--batch", 10**20], f"{10**20}: expected 1 or more, less than 2147483648; one value"),
        (["--vocab", 2**63], f"{2**63}: expected 100 or more, less than 10000000"),
        (["--max-lines", 2**63], f"{2**63}: expected 1 or more, less than"),
        (["--out", ""], "argument --out: an empty path; is a variable of the shell not set?"),
        (["--cache", " "], "argument --cache: an empty path"),
        (["--assistant", ""], "argument --assistant: an empty path"),
        (["--train", ""], "argument --train: an empty path"),
        (["--train", HERE, "--teacher", "x"], "it is a folder; name its files, as 'DIR/*.tsv'"),
        (["--sts", "no", "--teacher", "x", "--train", HERE / "data.py"], "no: no such folder"),
        (["--device", "nonsense"], "is not usable here"),
        (["--device", "mps"], "is not usable here"),
        (["--layers", "9"], "--layers 9: expected 1 to 4"),
        (["--stages", "2-4", "--assistant", "nowhere"], "nowhere: no such model directory"),
    ],
)
def test_parse_refuses_bad_commands(flags, message, tmp_path):
    place = ["--out", tmp_path / "run", "--cache", tmp_path / "cache"]
    done = run([sys.executable, HERE / "train.py", *place, *flags])
    assert (
        done.returncode == 2
        and message in done.stderr
        and done.stderr.count("\n") == 1
        and not list(tmp_path.glob("run/*/"))
        and not (tmp_path / "run" / "run.json").exists()
    )


def test_run_identity_is_of_the_content(world, finished, tmp_path, capsys):
    """Data that moved is the same; a file that changed is not, nor is a damaged table shown."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(world / "whole", out)
    for folder in ("d", "teacher"):
        shutil.copytree(world / folder, moved / folder)
    args = command(moved, out)
    assert "this run is finished" in run_here(capsys, args)
    write(out / "results.json", "{}")
    with pytest.raises(M.InputError, match="not this run's results.*delete it"):
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


def test_build_takes_what_a_faster_process_built(world, finished, tmp_path):
    place, folder = train.Run(train.parse(command(world, tmp_path)[2:])), tmp_path / "student"

    def slow():
        shutil.copytree(world / "whole" / "student", folder)
        return M.load(world / "whole" / "assistant", "float32")

    assert place.build(folder, slow) == folder
    assert checkpoints.fingerprint(folder) == checkpoints.fingerprint(world / "whole" / "student")


def test_check_models_refuses_other_widths(world, tokenizer, tmp_path):
    tiny(tokenizer, hidden_size=16).save(tmp_path / "narrow")
    done = run(command(world, tmp_path / "run", "--assistant", tmp_path / "narrow"))
    assert done.returncode == 2 and "the widths must match" in done.stderr


def test_start_cut_assistant_of_a_run(world, finished, tmp_path, capsys):
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


def test_main_on_other_systems(world, tmp_path):
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


def test_main_killed_at_random_moments(world, finished):
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
def test_fit_saves_and_leaves_at_a_signal(world, finished, number, code):
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


def test_restore_refuses_a_damaged_checkpoint(world, finished, tmp_path, capsys):
    shutil.copytree(world / "whole", out := tmp_path / "out")
    for name in ("results.json", "student"):
        data.delete(out / name)
    write(out / "checkpoint.safetensors", b"x" * 100)
    with pytest.raises(M.InputError, match="valid safetensors file: .*; delete it to redo stage 4"):
        run_here(capsys, command(world, out))


def test_main_in_processes_that_share_a_run(world, finished, tmp_path):
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
    meta = M.read_safetensors(tmp_path / "run" / "checkpoint.safetensors")[1]
    assert set(meta) == {"format", "run", "stage", "step", "best", "seconds"}
    assert (meta["stage"], meta["step"]) == ("stage 3", "4")
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
def test_main_on_a_gpu(world, tmp_path):
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


# ------------------------------------------------------------------------ whose is what is in --out
def stranger(world, folder):
    shutil.copytree(world / "teacher", folder)


@pytest.mark.parametrize("name", ["assistant", "student", "stages/stage2"])
def test_claim_refuses_a_model_of_nobody(world, tmp_path, capsys, name):
    """A model that lies in --out, even as the input, is neither taken for a result nor touched."""
    stranger(world, tmp_path / name)
    before = checkpoints.fingerprint(tmp_path / name)
    flags = ["--stages", "2-4", "--assistant", tmp_path / name]
    for more in ([], flags):
        with pytest.raises(M.InputError, match=f"{name}: not made by this run. Move it away or"):
            run_here(capsys, command(world, tmp_path, *more))
    assert checkpoints.fingerprint(tmp_path / name) == before
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("name", ["data", "teacher"])
def test_claim_refuses_a_demo_of_nobody(world, tmp_path, name):
    stranger(world, tmp_path / name)
    with pytest.raises(M.InputError, match=f"{name}: not made by this run"):
        train.main(["--out", str(tmp_path)])


@pytest.mark.parametrize("name", ["results.json", "log.jsonl", "checkpoint.safetensors"])
def test_claim_refuses_a_record_without_run_json(world, tmp_path, capsys, name):
    write(tmp_path / name, "{}")
    with pytest.raises(M.InputError, match=f"{name}: of a run that no run.json.* Move it away"):
        run_here(capsys, command(world, tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_claim_says_what_to_do_with_a_damaged_run_json(world, tmp_path, capsys, text):
    write(tmp_path / "run.json", text)
    with pytest.raises(M.InputError, match="run.json: not what a run is: .*; delete all of .* or"):
        run_here(capsys, command(world, tmp_path))


def test_claim_knows_what_this_run_has_made(world, finished, tmp_path, capsys):
    """Of a whole run: without run.json another seed is refused; so is a stranger's model in place
    of the run's, or another of its own; a file beside the weights changes nothing."""
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(world / "whole", out)
    for name in ("run.json", "results.json", "log.jsonl"):
        (out / name).unlink()
    with pytest.raises(M.InputError, match="assistant: not made by this run"):
        run_here(capsys, command(world, out, "--seed", "1"))
    shutil.rmtree(out)
    shutil.copytree(world / "whole", out)
    (out / "results.json").unlink()
    write(out / "student" / "README.md", "a note")
    assert "evaluated student, stage 4" in run_here(capsys, command(world, out, "--keep"))
    (out / "results.json").unlink()
    shutil.copy(world / "teacher" / "model.safetensors", out / "student")
    with pytest.raises(M.InputError, match="student: not made by this run"):
        run_here(capsys, command(world, out))
    shutil.copytree(world / "whole", other, ignore=shutil.ignore_patterns("results.json", "s*"))
    shutil.copytree(out / "assistant", other / "student")
    with pytest.raises(M.InputError, match="student: not made by this run"):
        run_here(capsys, command(world, other))


def test_claim_takes_a_run_of_an_older_revision(world, finished, tmp_path, capsys):
    """run.json without a key and folders without one: it continues."""
    out = tmp_path / "out"
    shutil.copytree(world / "whole", out)
    for file in (out / "results.json", out / "student", *out.rglob(train.MARK)):
        data.delete(file)
    settings = M.read_json(out / "run.json")
    settings.pop("key")
    write(out / "run.json", json.dumps(settings))
    told = run_here(capsys, command(world, out))
    assert "stage 4, " in told and "stage 3, " not in told


def test_restore_refuses_the_checkpoint_of_another_run(world, finished, tmp_path, capsys):
    shutil.copytree(world / "whole", out := tmp_path / "out")
    for name in ("results.json", "student"):
        data.delete(out / name)
    meta = {"run": "another", "stage": "stage 4", "step": "1"}
    M.write_safetensors(out / "checkpoint.safetensors", {"a": torch.ones(1)}, meta)
    with pytest.raises(M.InputError, match="checkpoint.safetensors: not of this run; delete it"):
        run_here(capsys, command(world, out))


def test_report_refuses_the_results_of_another_run(world, finished, tmp_path, capsys):
    shutil.copytree(world / "whole", out := tmp_path / "out")
    edit(out / "results.json", arguments={})
    with pytest.raises(M.InputError, match="not this run's results: of other arguments"):
        run_here(capsys, command(world, out))


@pytest.mark.parametrize("kept", [False, True])
def test_report_clears_what_a_kill_left(world, finished, tmp_path, capsys, kept):
    """What --keep kept stays, also where the table is asked for without the flag."""
    shutil.copytree(world / "whole", out := tmp_path / "out")
    edit(out / "results.json", keep=kept)
    write(out / "checkpoint.safetensors", "half")
    told = run_here(capsys, command(world, out))
    assert (out / "stages").exists() == kept and not (out / "checkpoint.safetensors").exists()
    lines = world / "d" / "dev" / "en-de.tsv"
    assert f"python -m tools search {out}/student {lines} 'what to look for'" in told
    assert told.endswith(f"python -m tools export {out}/student {out}/export\n")


def test_finish_names_the_folder_of_each_row(world, finished, tmp_path):
    """The card of an export finds its row by it, and in results of older revisions by the label."""
    results = M.read_json(world / "whole" / "results.json")
    folders = {k: row["folder"] for k, row in results["rows"].items()}
    assert folders == {
        "teacher": None,  # not the run's; results.json names no place outside
        "assistant, untrained": "stages/assistant-start",
        "assistant": "assistant",
        "student, untrained": "stages/student-start",
        "student, stage 2": "stages/stage2",
        "student, stage 3": "stages/stage3",
        "student, stage 4": "student",
    }
    score = {k: f"{row['spearman'].get('en-de', 0):.1f}" for k, row in results["rows"].items()}
    for name, label in (("student", "student, stage 4"), ("assistant", "assistant")):
        new = export.origin(world / "whole" / name)
        assert new[0] == ["de", "en"] and f"en-de {score[label]};" in new[1]
        old = json.loads(json.dumps(results))
        for row in old["rows"].values():
            row.pop("folder")
        write(tmp_path / "results.json", json.dumps(old))
        assert export.origin(tmp_path / name) == new


def test_fill_says_that_processes_need_one_folder(world, tmp_path):
    """A process that does not see what the first one made, as on a disk of its own."""
    place = train.Run(train.parse(command(world, tmp_path / "run")[2:]))
    place.rank, place.world, place.group = 1, 2, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.dist, "barrier", lambda group: None)
        with pytest.raises(M.InputError, match="process 1 does not see .* the same --out and"):
            place.fill(tmp_path / "run" / "data", None)


@pytest.mark.parametrize(
    "said",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "x"},
        {"WORLD_SIZE": "0", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
    ],
)
def test_run_says_what_torchrun_should_set(tmp_path, monkeypatch, said):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(M.InputError, match="WORLD_SIZE and RANK: not as .*; without it unset them"):
        train.Run(train.parse(["--out", str(tmp_path)]))


def test_run_takes_an_empty_world_size_for_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    place = train.Run(train.parse(["--out", str(tmp_path)]))
    assert (place.world, place.rank) == (1, 0)


# ----------------------------------------------------------------------- what is said, and how
@pytest.mark.parametrize(
    "flags, idle",
    [
        ([], ""),
        (["--init", "paper", "--layers", "1", "--recurrence", "2"], ""),
        (["--init", "paper", "--bottleneck", "0"], "--init"),
        (["--stages", "1", "--bottleneck", "8", "--no-contrast"], "--bottleneck --no-contrast"),
        (["--stages", "4", "--assistant", "x", "--vocab", "999"], "--vocab"),
    ],
)
def test_unused_names_the_flags_without_effect(flags, idle, capsys):
    data.note.cache_clear()
    train.parse(flags)
    said = capsys.readouterr().err
    note = f"note: {', '.join(idle.split())}: not used with these stages and sizes\n"
    assert said == (note if idle else "")


def test_sts_files_names_what_is_not_read(world, finished, tmp_path, capsys):
    """Names that do not match are said, and do not count: the run is the same with them."""
    place = tmp_path / "d"
    shutil.copytree(world / "d", place)
    for name in ("STS.en-DE.txt", "sts-en-fr.txt", "README.md", "dataset_infos.json"):
        write(place / "sts" / name, "x")
    data.note.cache_clear()
    assert list(data.sts_files(place / "sts")) == ["en-de"]
    said = capsys.readouterr().err
    assert "STS.en-DE.txt" in said and "sts-en-fr.txt" in said and "README.md" in said
    args = command(world, world / "whole", "--keep", "--sts", place / "sts")
    assert "this run is finished" in run_here(capsys, args)


def test_check_models_names_the_teacher_that_has_a_bottleneck(world, finished, tmp_path, capsys):
    student = world / "whole" / "student"
    with pytest.raises(M.InputError, match="student: has a bottleneck; give the full-size model"):
        run_here(capsys, command(world, tmp_path / "x", "--teacher", student))


def test_bootstrap_says_nothing_of_few_pairs():
    good = np.arange(evaluation.FEWEST_PAIRS)
    for n, known in ((2, False), (len(good) - 1, False), (len(good), True)):
        sets = {"en-de": ([], [], good[:n]), "en-en": ([], [], good)}
        scores = {k: s[2] for k, s in sets.items()}
        assert bool(evaluation.bootstrap(sets, scores, scores, 20)) == known


def test_preset_needs_a_value_for_each_stage(monkeypatch):
    """A fifth stage: the defaults follow, and a preset that has its own four is named."""
    monkeypatch.setitem(msd.STAGES, 5, msd.STAGES[4])
    with pytest.raises(M.InputError, match=r"lr=\(0.1, 0.1, 0.1, 0.1\): expected 5 values"):
        msd.Preset(8, (1,), 1, lr=(0.1,) * 4)


@pytest.mark.parametrize("flag", ["-P", "-I"])
def test_main_finds_its_files_without_the_script_folder(flag, tmp_path):
    done = run([sys.executable, flag, HERE / "train.py", "--layers", "0"])
    assert done.returncode == 2 and "argument --layers" in done.stderr, done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_run_cli_with_closed_streams(world, finished, closed):
    """The finished run's table: no traceback, and exit code 0."""
    shell = " ".join(map(shlex.quote, command(world, world / "whole", "--keep")))
    done = run(["sh", "-c", f"{shell} {closed}"])
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("Spearman" in done.stdout) == (">&-" not in closed.split())


@pytest.mark.parametrize("allocate", [torch.empty, bytes, np.empty])
def test_run_cli_out_of_memory(allocate, capsys):
    """torch's, Python's and numpy's, also where a file is being read."""

    def main():
        with M.reading("a file", "whole"):
            allocate(1 << 50)

    with pytest.raises(SystemExit) as done:
        cli.run_cli(main)
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: out of memory") and "--batch" in said and "a file" not in said


@pytest.mark.parametrize("out, code, said", [("/dev/full", 2, "error: [Errno 28]"), ("|", 1, "")])
def test_run_cli_says_what_fails_at_the_end(out, code, said):
    """What was printed waits in a buffer: a full disk or a closed pipe shows when it is written."""
    body = "import sys; from tools.cli import run_cli; run_cli(lambda: print('x'))"
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(body)}"
    if out == "|":  # the reader has gone before anything comes
        shell = f"({{ sleep 0.2; {shell}; echo $? >&2; }}) | true"
    else:
        shell = f"{shell} > {out}; echo $? >&2"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, cwd=HERE, env=env)
    *lines, last = done.stderr.splitlines()
    assert int(last) == code and len(lines) == bool(said) and "".join(lines).startswith(said)


def test_run_cli_lets_a_bug_be_seen():
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run_cli(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_atomic_leaves_what_another_container_writes(tmp_path, monkeypatch):
    """Same host name and folder, other process ids: its half stays; a dead one of here goes."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = write(tmp_path / f".x.tmp-{data.place()}@{gone.pid}", "half")
    data.place.cache_clear()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    there = write(tmp_path / f".x.tmp-{data.place()}@{gone.pid}", "half")
    monkeypatch.undo()
    data.place.cache_clear()
    with data.atomic(tmp_path / "x") as tmp:
        write(tmp, "whole")
    assert {f.name for f in tmp_path.iterdir()} == {"x", there.name} != {"x", here.name}


def test_atomic_names_the_file_on_a_full_disk(world, tmp_path):
    """Not the temporary one; RLIMIT_FSIZE stands in for the disk."""
    file = script(
        tmp_path / "full.py",
        """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
""",
    )
    done = run(command(world, tmp_path / "run", "--cache", tmp_path / "cache", script=file))
    assert done.returncode == 2 and "cannot write" in done.stderr and ".tmp-" not in done.stderr

"""Runs commands in forks of a process that has imported the large libraries, because that import takes longer than
most commands.

Each command has a process of its own, as with `python`: its environment, folder, arguments and modules. Hugging Face's
libraries are imported after the fork, because they read the environment at import.
Run as a script, this file is the forking process: it reads one JSON command per line and writes the exit code of each.
"""

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path


def run_python(*command, cwd: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Same result as `subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)`."""
    words = list(map(str, command))
    server = start_server()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/stdout", f"{folder}/stderr"]
        print(json.dumps([words, str(cwd), env, outputs]), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        stdout, stderr = (Path(file).read_text() for file in outputs)
    return subprocess.CompletedProcess([sys.executable, *words], code, stdout, stderr)


@functools.cache
def start_server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-I", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def import_libraries():
    import torchvision  # noqa: F401


def fork_for_command() -> list:
    """Fork for each command on standard input. Returns only in the forked process."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    sys.exit()


def set_up_process(cwd: str, env: dict[str, str], outputs: list[str]):
    import torch

    for number, file in enumerate([os.devnull, *outputs]):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # because torch read the variable before the fork


def run(words: list[str], env: dict[str, str]):
    """Run a module (`-m`), code (`-c`) or a script, in isolated mode (`-I`) or not."""
    is_isolated = words[0] == "-I"
    kind, *arguments = words[is_isolated:]
    if kind in ("-m", "-c"):
        kind, subject, folder = kind, arguments.pop(0), os.getcwd() if kind == "-m" else ""
    else:
        kind, subject, folder = "script", kind, str(Path(kind).absolute().parent)
    if not is_isolated:
        sys.path[:0] = [folder, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["-c" if kind == "-c" else subject, *arguments]
    if kind == "-m":
        runpy.run_module(subject, run_name="__main__", alter_sys=True)
    elif kind == "script":
        runpy.run_path(subject, run_name="__main__")
    else:
        exec(compile(subject, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


if __name__ == "__main__":
    import_libraries()
    words, cwd, env, outputs = fork_for_command()
    set_up_process(cwd, env, outputs)
    run(words, env)

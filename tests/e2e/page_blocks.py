"""Read the code blocks of a Markdown page, and run them in a folder of their own."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from forked_command import ForkedCommand
from forked_process import ForkedProcess

BLOCK = re.compile(r"(?:^<!-- needs: (\w+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")
FIGURE = re.compile(r"^ *print\(.*\)  # .*: (-?\d+\.(\d+))$", re.MULTILINE)
TIMEOUT = 300.0
PORT = "5000"  # of the MLflow server on the pages; replaced by a free port


@dataclass(frozen=True)
class Block:
    """A code block; `needs` is what the comment above it says that it needs, such as slurm."""

    language: str
    text: str
    needs: str | None

    @property
    def file_name(self) -> str | None:
        """The file that the block shows: its first line is a comment with the name."""
        match = FILE_NAME.match(self.text)
        return match[1] if match else None

    def commands(self) -> Iterator[str]:
        """Yield the commands of a bash block."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip()


def page_blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page, in order."""
    return [Block(m[2], m[3], m[1]) for m in BLOCK.finditer(page.read_text())]


def check_figures(code: str, output: str) -> None:
    """Check that the output has each number that a comment beside a `print` ends with, rounded."""
    numbers = [float(text) for text in re.findall(r"-?\d+\.\d+", output)]
    for figure, decimals in FIGURE.findall(code):
        assert figure in {f"{n:.{len(decimals)}f}" for n in numbers}, f"{figure} not in {output}"


class PythonSession:
    """A forked interpreter that runs the Python blocks of a page, one after another."""

    def __init__(self, folder: Path) -> None:
        self._connection, self._child_end = multiprocessing.Pipe()
        self._folder = folder
        self._process = ForkedProcess(self._serve)
        self._child_end.close()

    def run(self, code: str, environment: dict[str, str]) -> str:
        """Run code and return its output; fail with its traceback if it raises."""
        self._connection.send((code, environment))
        assert self._connection.poll(TIMEOUT), f"timed out:\n{code}"
        output, error = self._connection.recv()
        assert error is None, f"{code}\n{output}\n{error}"
        return str(output)

    def close(self) -> None:
        """End the interpreter."""
        self._process.kill()
        self._process.wait()

    def _serve(self) -> int:
        self._connection.close()
        os.chdir(self._folder)
        sys.path.insert(0, str(self._folder))
        torch.set_num_threads(1)
        names: dict[str, Any] = {"__name__": "__main__"}
        while True:
            code, environment = self._child_end.recv()
            os.environ.update(environment)
            error = None
            with redirect_stdout(io.StringIO()) as output:
                try:
                    exec(compile(code, "<page>", "exec"), names)
                except BaseException:
                    error = traceback.format_exc()
            self._child_end.send((output.getvalue(), error))


class PageRunner:
    """Runs the blocks of a page in a folder, as a reader would who follows the page.

    RUN_ID stands for the newest finished training, OTHER_RUN_ID for the one before it, and
    KILLED_RUN_ID for a training that SIGTERM has ended. A command that ends with `&` runs until
    the end of the page. `start` starts a qtorch command (the fixture of conftest.py).
    """

    def __init__(self, folder: Path, start: Callable[..., ForkedCommand]) -> None:
        self.folder, self._start_command = folder, start
        # A server of MLflow would start eight processes for the evaluation of language models.
        self._environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._background: list[tuple[str, Any]] = []
        self._python: PythonSession | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])

    def run_block(self, block: Block) -> None:
        """Run a bash or Python block, or write the file that the block shows."""
        if block.file_name:
            path = self.folder / block.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text.split("\n", 1)[1])  # Hydra reads the first line
        elif block.language == "python":
            if self._python is None:
                self._python = PythonSession(self.folder)
            output = self._python.run(self._insert_values(block.text), self._environment)
            check_figures(block.text, output)
        elif block.language == "bash":
            for command in block.commands():
                self.run_command(self._insert_values(command))

    def run_command(self, command: str) -> None:
        """Run a command and check its exit code; `NAME=value` in front of it is its environment."""
        words = self._split_words(command)
        if words[0] == "export":
            self._environment.update(word.split("=", 1) for word in words[1:])  # type: ignore[misc]
            return
        in_background = words[-1] == "&"
        process = self._start_process(command, words[:-1] if in_background else words)
        if in_background:
            self._background.append((command, process))
            if "--port" in words:
                wait_for_port(int(words[words.index("--port") + 1]), process)
            return
        check_process(command, process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop the servers; wait for the other background commands, and check them."""
        if self._python is not None:
            self._python.close()
        for command, process in self._background:
            if isinstance(process, ForkedCommand):
                if kind is None:
                    check_process(command, process)
            else:
                process.terminate()
                process.communicate(timeout=30)

    def _split_words(self, command: str) -> list[str]:
        """Split a command as bash does, with its quotes, variables and comments."""
        echo = "printf '%s\\0' " + re.sub(r"&$", "'&'", command)
        environment = {**os.environ, **self._environment}
        output = subprocess.check_output(
            ["bash", "-c", echo], cwd=self.folder, env=environment, text=True
        )
        return output.split("\0")[:-1]

    def _start_process(self, command: str, words: list[str]) -> Any:
        environment = dict(self._environment)
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words[0] == "qtorch":
            return self._start_command(*words[1:], **environment)
        if words[0] == "python":
            return ForkedProcess(lambda: self._run_script(words[1], environment))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "-c", "exec " + command.rstrip("& ")],
            cwd=self.folder,
            env={**os.environ, **environment, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _run_script(self, name: str, environment: dict[str, str]) -> int:
        os.chdir(self.folder)
        os.environ.update(environment)
        sys.path.insert(0, str(self.folder))
        torch.set_num_threads(1)
        try:
            runpy.run_path(name, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def _insert_values(self, text: str) -> str:
        """Replace RUN_ID, OTHER_RUN_ID, KILLED_RUN_ID and the server's port."""
        if "KILLED_RUN_ID" in text:
            text = text.replace("KILLED_RUN_ID", self._kill_training())
        if "RUN_ID" in text:
            run_ids = [run.id for run in list_trainings("FINISHED")]
            text = text.replace("OTHER_RUN_ID", run_ids[-2] if len(run_ids) > 1 else "")
            text = text.replace("RUN_ID", run_ids[-1])
        return re.sub(rf"(--port |127\.0\.0\.1:){PORT}", rf"\g<1>{self._port}", text)

    def _kill_training(self) -> str:
        """Start a training, stop it by SIGTERM after its first epoch, and return its run ID."""
        job = ("train", "debug=tiny", "trainer.max_epochs=20", "callbacks=no_stop")
        process = self._start_command(*job, "model.network.hidden_size=16", **self._environment)
        end = time.monotonic() + TIMEOUT
        while not (
            running := [r for r in list_trainings("RUNNING") if r.metric_history("valid/loss")]
        ):
            assert time.monotonic() < end, "no epoch"
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.terminate()
        process.communicate(timeout=TIMEOUT)
        return str(running[-1].id)


def list_trainings(status: str) -> list[Any]:
    """Return the runs of trainings in the folder's store, oldest first (not those of sweeps)."""
    from qtorch import R

    runs = [
        run
        for name in R.list_experiments()
        for run in R.list_recorders(experiment_name=name).values()
        if run.status == status and "hostname" in run.list_tags()
    ]
    return sorted(runs, key=lambda run: str(run.start_time))


def check_process(command: str, process: Any) -> None:
    """Wait for a process; fail with its output if its exit code is not 0."""
    if isinstance(process, ForkedProcess) and not isinstance(process, ForkedCommand):
        assert process.wait(TIMEOUT) == 0, command
        return
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, f"{command}\n{out[-4000:]}\n{err[-8000:]}"


def wait_for_port(port: int, process: subprocess.Popen[str]) -> None:
    """Wait until a server answers at a port of this machine."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    raise AssertionError(f"no server at port {port}")

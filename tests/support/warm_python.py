"""A `python` that has its libraries loaded when it starts, for what DVC runs: importing torch takes seconds each time.

Every command is forked from one process that has imported the libraries and nothing of the project, so the modules of
the folder that it is started in, and of PYTHONPATH, are imported as usual. Signals do not reach a command.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = (
    "torch", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "torch.distributed.fsdp", "torchvision",
    "einops._torch_specific", "h5py", "matplotlib.backends.backend_agg", "matplotlib.figure", "numpy.ma", "PIL.Image",
    "rich.progress", "ruamel.yaml", "safetensors.torch",
)  # fmt: skip
CLIENT = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1:2] != ["-m"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    command = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(command).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(command)
    sys.exit(int(server.recv(9) or b"70"))
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """Start the process that commands are forked from.

    Args:
        folder: A new folder, for its socket and its `python`; the path of a socket may have about 100 characters.

    Yields:
        The folder to put first on PATH.
    """
    address = folder / "socket"
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    python.chmod(0o755)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    process = subprocess.Popen(
        [sys.executable, __file__, str(address)], stdout=subprocess.PIPE, env=variables, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield python.parent
    finally:
        process.kill()
        process.communicate()


def serve(address: str) -> None:
    """Fork a process for each command, and in it one that runs the command, whose exit code is sent to the client."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        if os.fork():
            client.close()
            continue
        listener.close()
        header, descriptors, _, _ = socket.recv_fds(client, 4, 3)
        arguments, folder, variables = json.loads(client.makefile("rb").read(int.from_bytes(header, "big")))
        if (command := os.fork()) == 0:
            client.close()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            for number, name in enumerate(("stdin", "stdout", "stderr")):
                setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
            os.environ.clear()
            os.environ.update(variables)
            os.chdir(folder)
            sys.argv[1:] = arguments[1:]
            sys.path[:1] = [folder, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            sys.exit()
        _, status = os.waitpid(command, 0)
        client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)


if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    serve(sys.argv[1])

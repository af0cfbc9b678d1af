"""Models that a user's own Python file builds, written `FILE.py:FUNCTION`.

The file is code that runs with all of the user's rights. A recipe or a command line may name it, a checkpoint may not.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, UsageError

if TYPE_CHECKING:
    from torch import nn

_OWN = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)", re.DOTALL)


def is_own(model: str) -> bool:
    """Return whether a model's name is that of a user's function, `FILE.py:FUNCTION`."""
    return _OWN.fullmatch(model) is not None


def load_function(model: str) -> Callable[..., nn.Module]:
    """Run a user's file and return its function.

    The file runs once a process for each of its contents. What it or the function prints goes to stderr. Modules
    beside the file can be imported from it.

    Args:
        model: `FILE.py:FUNCTION`; the file is relative to the working directory.

    Returns:
        The function, with its attributes. Where it fails, or returns no nn.Module, the caller gets a UsageError.

    Raises:
        UsageError: There is no such file or function, or the file fails; the message has its own error.
    """
    file, name = _parts(model)
    module = _module(model, file)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if _is_function_of(value, module)]
        raise UsageError(f"model {model!r}: {file} has no function {name!r}; it has {', '.join(known) or 'none'}")

    @functools.wraps(function)  # with its attributes, which may say more of the model
    def build(*args: Any, **arguments: Any) -> nn.Module:
        from torch import nn

        with _own_errors(model, f"{name}(...)"):
            built = function(*args, **arguments)
        if not isinstance(built, nn.Module):
            raise UsageError(f"model {model!r}: {name}(...) returns {type(built).__name__}, not a torch.nn.Module")
        return built

    return build


def code_sha256(model: str) -> str | None:
    """Return the SHA-256 of the file that a user's model is built by; None for other models.

    Modules that the file imports are not part of it.

    Raises:
        UsageError: There is no such file.
    """
    return hashlib.sha256(_read(model, _parts(model)[0])).hexdigest() if is_own(model) else None


def _parts(model: str) -> tuple[Path, str]:
    match = _OWN.fullmatch(model)
    if match is None:
        raise UsageError(f"model {model!r} is not of the form FILE.py:FUNCTION")
    return Path(match["file"]), match["function"]


def _read(model: str, file: Path) -> bytes:
    if not file.is_file():
        raise UsageError(f"model {model!r}: there is no file {file} in {Path.cwd()}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"model {model!r}: {file} cannot be read ({error})") from error


def _module(model: str, file: Path) -> ModuleType:
    """Return the module of a file, run now if this content of it has not been."""
    content, folder = _read(model, file), str(file.resolve().parent)
    digest = hashlib.sha256(f"{file.resolve()}\n".encode() + content).hexdigest()
    name = f"own_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if folder not in sys.path:
        sys.path.append(folder)  # for good, since a function may import late; last, so that it hides no other module
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        with _own_errors(model, str(file)):
            # Not the spec's loader: it could take bytecode of a file that was changed within the same second.
            exec(compile(content, str(file), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _own_errors(model: str, what: str) -> Iterator[None]:
    """Turn an error of the user's code into one line; what the code prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except PipelineError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"model {model!r}: {what} fails: {type(error).__name__}: {error}") from error


def _is_function_of(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__

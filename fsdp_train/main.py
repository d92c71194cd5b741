"""Fine-tune Llama 2.

    torchrun -m fsdp_train.main                                                    # the demo
    torchrun -m fsdp_train.main --model.path DIR --data.path FILE                  # yours
    torchrun --nproc_per_node 8 -m fsdp_train.main --model.path DIR --data.path FILE

`--help` lists all settings.
"""

from __future__ import annotations

import errno
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import closing

from fsdp_train.config import RunConfig, parse_config
from fsdp_train.run import Run
from fsdp_train.settings import fail
from fsdp_train.signals import Stopped
from fsdp_train.step import NonFiniteError
from fsdp_train.world import PeerError, process_group
from llama.errors import InputError
from llama.files import cannot_write

# What a disk answers that is full, or may not be written: nothing that a traceback would explain.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and turn an error that the user can mend into one line and a non-zero exit code."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of DCP, where there is one process
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments)
        fine_tune(config)
    except InputError as error:
        fail(error)
    except NonFiniteError as error:
        fail(error, 3)
    except (Stopped, KeyboardInterrupt) as error:
        what_next = "the same command, with its --train.output_dir, continues from the newest checkpoint"
        fail(f"{str(error) or 'interrupted'}; {what_next}", 128 + getattr(error, "signal", 2))
    except PeerError as error:
        fail(error, 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            fail(_in_one_line(error, cannot_write(error.filename or config.train.output_dir, error)))
        if getattr(error, "prints", True):
            traceback.print_exc()
        error.args = (f"{type(error).__name__}: {error}",)
        fail(error, 1)


def _in_one_line(error: BaseException, text: str) -> InputError:
    """The same error for people, told by the process that would have told it."""
    told = InputError(text)
    if hasattr(error, "prints"):
        told.prints = error.prints  # type: ignore[attr-defined]
    return told


def fine_tune(config: RunConfig) -> None:
    """One run, from its settings to what the user keeps.

    Raises:
        InputError: before the first step, on every process alike.
        NonFiniteError: at the step that would have spoilt the weights.
    """
    with process_group(config.parallel) as world:
        complete(Run(config, world))


def complete(run: Run) -> None:
    """The steps of a run, in order. Its directory is another run's to use when it ends, however it ends."""
    started = time.perf_counter()
    with closing(run):
        with run.world.together():
            for line in run.config.checked(run.world.size):
                run.tell(line)
        run.prepare()
        run.wrap()
        before = run.measure("before")
        run.train()
        run.save()  # before measuring: whatever happens there, what was trained is kept
        after = run.measure("after")
        run.sum_up(before, after, time.perf_counter() - started)


if __name__ == "__main__":
    main()

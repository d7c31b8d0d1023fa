"""Writes checkpoints in a background thread while training continues."""

import threading
import time

from distributed.checkpoint import Snapshot, prune
from distributed.lease import owns
from distributed.run_log import RunLog


class CheckpointWriter:
    """Writes snapshots one by one into a run's storage; rank 0 has one."""

    def __init__(self, folder: str, keep: int, run_log: RunLog, owner: str) -> None:
        """Write into a run.

        Args:
            folder: folder or URI of the run.
            keep: newest checkpoints that are kept, besides the best one.
            run_log: of the run; a checkpoint's lines are in the storage before it is complete.
            owner: the ownership that the driver of this worker has (`distributed.lease`). Another
                driver's checkpoints are not deleted.
        """
        self._folder, self._keep = folder, keep
        self._log, self._owner = run_log, owner
        self.seconds = 0.0
        """Duration of writing the last checkpoint; 0 before the first."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, snapshot: Snapshot) -> None:
        """Start to write `snapshot`; first waits for the last one, so memory holds one at a time.

        Raises:
            OSError: the last snapshot could not be written.
        """
        self.wait()
        self._thread = threading.Thread(
            target=self._write, args=(snapshot,), name="checkpoint-writer", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last snapshot is a complete checkpoint.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            started = time.monotonic()
            self._log.keep()
            written = snapshot.write(self._folder)
            self.seconds = time.monotonic() - started
            if owns(self._folder, self._owner):
                prune(self._folder, self._keep, written)
        except BaseException as error:  # raised again where training waits for the writer
            self._error = error

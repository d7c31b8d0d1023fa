"""Writes checkpoints in a background thread while training continues."""

import threading

from distributed.checkpoint import Snapshot, prune


class CheckpointWriter:
    """Writes snapshots one by one into a run's storage; rank 0 has one."""

    def __init__(self, folder: str, keep: int) -> None:
        """Write into the run `folder`; keep the newest `keep` checkpoints and the best one."""
        self._folder, self._keep = folder, keep
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
            snapshot.write(self._folder)
            prune(self._folder, self._keep)
        except BaseException as error:  # raised again where training waits for the writer
            self._error = error

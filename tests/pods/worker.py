"""The digits experiment, which sends a signal to itself at a moment that the environment says.

LTP_SIGNAL is the number of the signal, LTP_BATCH the training batch of this process that sets it off, LTP_DELAY how
many seconds later it comes. With LTP_WHILE_SAVING it comes when an entry of the trail, not the dense one, began to be
written; with LTP_BEFORE_ENTRY just before, when the state of the same step is on disk.

JAX looks for a SIGTERM of a job of several processes once a second, in which the whole of so small a run would pass:
LTP_SLOWLY is how many seconds each batch after the signal takes.
"""

import os
import signal
import threading
import time

from experiments import digits
from experiments.data.in_memory import InMemoryDataset
from experiments.ending import run_command
from ltp_jax.trail import Trail


def send() -> None:
    number = signal.Signals(int(os.environ["LTP_SIGNAL"]))
    threading.Timer(float(os.environ.get("LTP_DELAY", "0")), os.kill, (os.getpid(), number)).start()


def main() -> None:
    drawn = 0
    train, save = InMemoryDataset.train, Trail.save

    def counted_batches(self, batch_size, **options):
        nonlocal drawn
        for batch in train(self, batch_size, **options):
            drawn += 1
            if drawn == int(os.environ.get("LTP_BATCH", "0")):
                send()
            if 0 < int(os.environ.get("LTP_BATCH", "0")) <= drawn:
                time.sleep(float(os.environ.get("LTP_SLOWLY", "0")))
            yield batch

    def watched_save(self, entry, params, batch_stats):
        if entry.epoch > 0 and "LTP_BEFORE_ENTRY" in os.environ:
            state, deadline = self.path.parent / "resume" / str(entry.step), time.monotonic() + 30
            while not state.is_dir() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), int(os.environ["LTP_SIGNAL"]))
        save(self, entry, params, batch_stats)
        if entry.epoch > 0 and "LTP_WHILE_SAVING" in os.environ:
            os.kill(os.getpid(), int(os.environ["LTP_SIGNAL"]))

    InMemoryDataset.train = counted_batches
    Trail.save = watched_save
    digits.main()


if __name__ == "__main__":
    run_command(main)

"""Somebody who answers all that is asked, beside the test."""

import threading
import uuid

from trl.evaluation.people.store import Refused, Store


class Voter:
    """Answers in a thread of its own; `answer` gets what is shown, and None is no answer."""

    def __init__(self, path, answer, name="ann", pause=0.02):
        self.path, self.answer, self.name, self.pause = path, answer, name, pause
        self.seen = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _go_on(self):
        while not self.path.is_file() and not self._over.wait(self.pause):
            pass
        store = Store(self.path, make=True)
        me = store.join(store.link(self.name))
        while not self._over.wait(self.pause):
            shown = store.next(me) if store.fact("question") else None
            answer = shown and self.answer(shown)
            if answer is not None and shown:
                try:
                    store.vote(me, shown.id, uuid.uuid4().hex, answer)
                    self.seen.append(shown.responses[0])
                except Refused:
                    pass
        store.close()

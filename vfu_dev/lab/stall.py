"""KubeVirt's stall detector, as its VEP 248 describes it: has a pre-copy stopped making progress?

It looks at the bytes that remain at the beginning of each pass, and never at the time that one takes. Once
it finds that they do not fall any more, it waits for a pass that has about as few as the best one had.
"""

from __future__ import annotations

# After a window without such a pass the detector accepts the next best, and multiplies the window by this.
PATIENCE_DECAY = 0.5


class StallDetector:
    """Fed with the bytes that remain at each pass; `stalled` once there has been no progress.

    Args: window_seconds: VEP 248's `stallProgressTimeout`. margin: its `stallMargin`, a share.
    """

    def __init__(self, window_seconds: float, margin: float) -> None:
        self.stalled = False
        self._window_seconds = window_seconds
        self._margin = margin
        self._passes: list[tuple[float, float]] = []  # seconds, remaining bytes
        self._best_bytes = 0.0
        self._since_stall: list[float] = []
        self._patience_seconds = window_seconds
        self._deadline_seconds = 0.0

    def begin_pass(self, seconds: float, remaining_bytes: float) -> bool:
        """Take the beginning of a pass; return whether to stop the VM now, because of a stall.

        Args: seconds: since the migration began.
        """
        if self.stalled:
            return self._wait(seconds, remaining_bytes)
        before = [left for at, left in self._passes if at <= seconds - self._window_seconds]
        if before and remaining_bytes >= min(before) * (1 - self._margin):
            self.stalled = True
            self._best_bytes = min(left for _, left in self._passes)
            self._deadline_seconds = seconds + self._patience_seconds
            return self._is_near_best(remaining_bytes)
        self._passes.append((seconds, remaining_bytes))
        return False

    def _wait(self, seconds: float, remaining_bytes: float) -> bool:
        self._since_stall.append(remaining_bytes)
        if not self._is_near_best(remaining_bytes) and seconds >= self._deadline_seconds:
            self._best_bytes = min(self._since_stall)
            self._since_stall.remove(self._best_bytes)
            self._patience_seconds *= PATIENCE_DECAY
            self._deadline_seconds = seconds + self._patience_seconds
        return self._is_near_best(remaining_bytes)

    def _is_near_best(self, remaining_bytes: float) -> bool:
        return remaining_bytes <= self._best_bytes * (1 + self._margin)

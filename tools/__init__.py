"""What one runs around a training."""
import prepare  # noqa: F401 (it tells an older Python, in one line)
